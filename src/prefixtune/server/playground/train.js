"use strict";
// From a file to a job.

(() => {
  const ATTACHED = ["validation", "questions"];
  const state = { file: null, sending: null, validation: null, questions: null, examples: [], turn: 0 };
  const isDocument = () => state.file !== null && state.file.purpose === "document";
  const asksFile = () => document.querySelector("[name=questions]:checked").value === "file";

  // --- the file ---

  async function take(file) {
    if (state.sending) state.sending.stop();
    const mine = state.sending = sendFile(file, purposeOf(file), showSent);
    forgetFile();
    at("sending").hidden = false;
    showSent(0);
    try {
      const stored = await mine.done;
      at("sending").hidden = true;
      loadFiles();
      await use(stored);
    } catch (error) {
      if (mine !== state.sending) return;
      sayFile(error.name === "AbortError" ? "The upload was stopped." : error.message, error.name !== "AbortError");
    } finally {
      if (mine === state.sending) {
        state.sending = null;
        at("sending").hidden = true;
        at("file").value = "";
      }
    }
  }

  function showSent(share) {
    if (share < 1) at("sent").value = share;
    else at("sent").removeAttribute("value");
    sayFile(share < 1 ? "The file is sent …" : "The server reads it …");
  }

  function sayFile(text, bad = false) {
    at("file-said").textContent = text;
    at("file-said").className = bad ? "error" : "";
  }

  function forgetFile() {
    Object.assign(state, { file: null, examples: [], turn: state.turn + 1 });
    at("read").hidden = true;
    showSetup();
  }

  /** Train on a file that the server has. */
  async function use(file) {
    forgetFile();
    const turn = state.turn;
    if (file.status === "error") { sayFile(file.status_details || "The file cannot be read.", true); return; }
    sayFile(factsOf(file).summary || file.filename);
    // Without it training is possible all the same: as where the model runs elsewhere.
    const preview = await getJson(`/v1/files/${encodeURIComponent(file.id)}/preview`).catch((error) => ({ cuts: error.message }));
    if (turn !== state.turn) return;
    state.file = file;
    state.examples = preview.examples || [];
    showRead(file, preview);
    at("takes").textContent = sayDuration();
    if (!at("name").value) at("name").value = nameFrom(file.filename);
    showSetup();
  }

  function sayDuration() {
    const before = isDocument() ? ": before it, questions and answers are made" : "";
    return `How long it takes is shown after the first step${before}.`;
  }

  function nameFrom(filename) {
    return filename.replace(/(\.\w{1,8}){1,2}$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[.-]+|-+$/g, "").slice(0, 64);
  }

  async function loadFiles() {
    try {
      const files = (await getJson("/v1/files?limit=50&order=desc")).data.filter((file) => file.purpose !== "fine-tune-results");
      at("earlier").hidden = !files.length;
      at("files").replaceChildren(...files.map(fileRow));
    } catch {
      at("earlier").hidden = true;
    }
  }

  function fileRow(file) {
    const again = make("button", { type: "button", textContent: "Use", disabled: file.status === "error" });
    const remove = make("button", { type: "button", textContent: "Delete" });
    again.setAttribute("aria-label", `Use ${file.filename}`);
    remove.setAttribute("aria-label", `Delete ${file.filename}`);
    again.addEventListener("click", () => use(file));
    remove.addEventListener("click", async () => {
      try {
        await api(`/v1/files/${encodeURIComponent(file.id)}`, { method: "DELETE" });
        if (state.file && state.file.id === file.id) { forgetFile(); sayFile(`${file.filename} was deleted.`); }
        for (const kind of ATTACHED) if (state[kind] && state[kind].id === file.id) detach(kind, `${file.filename} was deleted.`);
        at("file").focus();
        loadFiles();
      } catch (error) {
        sayFile(error.message, true);
      }
    });
    return make("li", {}, make("span", {}, file.filename, " ", make("small", { className: file.status === "error" ? "error" : "quiet" }, file.status === "error" ? file.status_details : bytes(file.bytes))), again, remove);
  }

  /** Forget a file that was sent beside the one to train on. */
  function detach(kind, text) {
    at(`${kind}-file`).value = "";
    // Stops what is still being sent.
    at(`${kind}-file`).dispatchEvent(new Event("change"));
    at(`${kind}-said`).textContent = text;
  }

  // --- the settings ---

  function showSetup() {
    at("start").disabled = state.file === null;
    at("start-said").textContent = state.file ? "" : "Choose a file first.";
    at("start-said").className = "";
    at("about-document").hidden = at("probes").hidden = !isDocument();
    at("validation").hidden = isDocument();
    for (const element of [at("questions-file"), at("questions-file").previousElementSibling]) element.hidden = !asksFile();
    if (!state.file) at("takes").textContent = "";
    showBases();
    [...at("probes").querySelectorAll("input")].forEach((input, index) => { if (!input.value) input.value = DOCUMENT_QUESTIONS[index]; });
  }

  /** What a training may start from. */
  function showBases() {
    const { backbone, models } = jobs.state, chosen = at("base").value;
    const prefixes = models.filter(({ id, kind }) => id !== backbone && kind !== "joined").map(({ id }) => id);
    const bases = [backbone, ...prefixes].filter(Boolean);
    at("base").replaceChildren(...bases.map((id) => make("option", { value: id, textContent: id === backbone ? `${id} (new)` : id })));
    if (bases.includes(chosen)) at("base").value = chosen;
  }

  const number = (id) => (at(id).value === "" ? null : Number(at(id).value));

  function requestBody() {
    const hyperparameters = {}, own = {};
    if (number("epochs") !== null) hyperparameters.n_epochs = number("epochs");
    if (number("rate") !== null) hyperparameters.learning_rate_multiplier = number("rate");
    if (at("name").value) own.name = at("name").value;
    if (number("prefix-length") !== null) own.prefix_length = number("prefix-length");
    if (!at("read-as").hidden) own.form = at("form").value;
    if (isDocument() && asksFile() && state.questions) own.questions = state.questions.id;
    const body = { model: at("base").value || jobs.state.backbone, training_file: state.file.id, prefixtune: own };
    if (Object.keys(hyperparameters).length) body.method = { type: "supervised", supervised: { hyperparameters } };
    if (number("seed") !== null) body.seed = number("seed");
    if (state.validation && !isDocument()) body.validation_file = state.validation.id;
    return body;
  }

  /** What will be asked before and after; null: the file's examples could not be read. */
  function questions() {
    if (!isDocument()) return state.examples.length ? questionsOf(state.examples) : null;
    const texts = [...at("probes").querySelectorAll("input")].map((input) => input.value.trim()).filter(Boolean);
    return texts.map((content) => [{ role: "user", content }]);
  }

  async function start() {
    if (!state.file) return;
    if (isDocument() && asksFile() && !state.questions) { sayStart("Choose a file of questions, or let the model make them.", true); return; }
    if (!isDocument() && at("validation-file").files.length && !state.validation) { sayStart("The validation file is not there yet: wait for it, or choose none.", true); return; }
    at("start").disabled = true;
    sayStart("It is queued …");
    try {
      const job = await postJson("/v1/fine_tuning/jobs", requestBody());
      sayStart("Started.");
      at("name").value = "";
      jobs.begin(job, questions());
    } catch (error) {
      sayStart(error.message, true);
    } finally {
      at("start").disabled = state.file === null;
    }
  }

  function sayStart(text, bad = false) {
    at("start-said").textContent = text;
    at("start-said").className = bad ? "error" : "";
  }

  // --- start ---

  const drop = at("drop");
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.className = "over"; });
  drop.addEventListener("dragleave", () => { drop.className = ""; });
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.className = "";
    if (event.dataTransfer.files.length > 1) sayFile("One file at a time, please.", true);
    else if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  // A file that misses the field does not replace the page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
  at("file").addEventListener("change", () => { if (at("file").files.length) take(at("file").files[0]); });
  at("stop-upload").addEventListener("click", () => { if (state.sending) state.sending.stop(); });
  attachFile(at("questions-file"), at("questions-said"), (file) => { state.questions = file; });
  attachFile(at("validation-file"), at("validation-said"), (file) => { state.validation = file; });
  at("about-document").addEventListener("change", showSetup);
  // In closed details the browser shows nothing of a wrong value.
  at("setup").addEventListener("invalid", () => {
    const input = at("setup").querySelector("input:invalid"), details = input.closest("details");
    if (details) details.open = true;
    sayStart(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`, true);
  }, true);
  at("setup").addEventListener("submit", (event) => { event.preventDefault(); start(); });
  const begin = async (look) => { await look(); showSetup(); loadFiles(); };
  jobs.onNews(({ isBack }) => { showBases(); if (isBack) loadFiles(); });
  useKeyForm(() => {
    forgetFile();
    sayFile("");
    for (const kind of ATTACHED) detach(kind, "");
    begin(jobs.restart);
  });
  begin(jobs.start);
})();
