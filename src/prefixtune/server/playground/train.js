"use strict";
// From a file to a job, and from a job to its answers.
(() => {
  const DOCUMENT = /\.(txt|text|md|markdown|rst)$/i;
  /** What is asked about a document before and after. */
  const DOCUMENT_QUESTIONS = ["What is this text about?", "Who or what does it name first?", "What happens in it?"];
  const ENDED = ["succeeded", "failed", "cancelled"];
  const RUNNING_MS = 1500, IDLE_MS = 15000, PAGE = 20, MAX_LISTED = 100, MAX_EVENT_PAGES = 20, MAX_POINTS = 300, MAX_ANSWER = 120;
  const state = {
    file: null, examples: [], upload: null, sent: new WeakMap(),
    backbone: "", models: [], isKnown: false, jobs: [], limit: PAGE, id: location.hash.slice(1), shown: "",
    events: new Map(), asked: new Map(), asking: "",
  };

  const count = (number) => Number(number).toLocaleString("en");
  const size = (bytes) => (bytes < 2 ** 20 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`);
  const button = (text, label, action) => {
    const element = make("button", { type: "button", textContent: text, ariaLabel: label });
    element.addEventListener("click", action);
    return element;
  };

  // --- the file ---

  /** Send a file; the server's object of it. */
  async function send(file, purpose, signal) {
    const body = new FormData();
    body.append("purpose", purpose);
    body.append("file", file, file.name);
    const stored = await (await api("/v1/files", { method: "POST", body, signal })).json();
    if (stored.status === "error") throw new Error(stored.status_details || "The file cannot be read.");
    return stored;
  }

  /** Send the file to train on, and show what the server reads of it. */
  async function take(file) {
    const mine = startUpload();
    at("sending").hidden = false;
    say("file-said", `${file.name} is sent and read …`);
    try {
      const stored = await send(file, DOCUMENT.test(file.name) ? "document" : "fine-tune", mine.signal);
      await use(stored, mine);
    } catch (error) {
      if (error.name === "AbortError" && mine === state.upload) say("file-said", "The upload was stopped.");
      else if (mine === state.upload) say("file-said", error.message, "error");
    }
    if (mine === state.upload) at("sending").hidden = true;
    at("file").value = "";
    loadFiles();
  }

  /** Forget the file before, and stop its upload. */
  function startUpload() {
    if (state.upload) state.upload.abort();
    Object.assign(state, { upload: new AbortController(), file: null, examples: [] });
    at("sending").hidden = at("read").hidden = true;
    showSetup();
    return state.upload;
  }

  /** Train on a file that the server has. */
  async function use(file, mine = startUpload()) {
    // A file can be trained on without a preview.
    const preview = await getJson(`/v1/files/${encodeURIComponent(file.id)}/preview`).catch(() => ({}));
    if (mine !== state.upload) return;
    Object.assign(state, { file, examples: preview.examples || [] });
    const facts = file.prefixtune || {}, forms = facts.forms || [];
    say("file-said", facts.summary || file.filename);
    showFigures("facts", [
      ...(isDocument() ? [["characters", count(facts.characters)]] : [["rows", count(facts.rows)], ["examples", count(facts.examples)], ["targets", count(facts.targets)]]),
      ["size", size(file.bytes)],
    ]);
    at("read-as").hidden = forms.length < 2 || Boolean(facts.form);
    at("form").replaceChildren(...forms.map((form) => make("option", { value: form }, form)));
    const sample = state.examples.length ? partsOf(state.examples[0]) : [];
    at("sample").replaceChildren(...sample.map(({ role, text, trained }) => make("p", {}, role ? make("b", {}, `${role}: `) : "", trained ? make("mark", {}, text) : text)));
    at("sample").hidden = !sample.length;
    at("read").hidden = false;
    if (!at("name").value) at("name").value = file.filename.replace(/(\.\w{1,8}){1,2}$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[.-]+|-+$/g, "").slice(0, 64);
    showSetup();
  }

  /** The texts of an example, in order, and which of them are learned. */
  function partsOf({ messages, source, targets = [] }) {
    if (messages) return messages.map(({ role, content, trained }) => ({ role, text: content, trained }));
    return [...(source ? [{ text: source }] : []), ...targets.map((text) => ({ text, trained: true }))];
  }

  /** Pasted examples, as a file. */
  function pasted() {
    const rows = at("pasted").value.split("\n").map((line) => /^(.+?)(?:\t|=>)(.+)$/.exec(line)).filter(Boolean);
    const lines = rows.map(([, prompt, completion]) => `${JSON.stringify({ prompt: prompt.trim(), completion: completion.trim() })}\n`);
    return new File(lines, "pasted.jsonl");
  }

  async function loadFiles() {
    const files = await getJson("/v1/files?limit=50&order=desc").then(({ data }) => data.filter(({ purpose }) => purpose !== "fine-tune-results")).catch(() => []);
    at("earlier").hidden = !files.length;
    at("files").replaceChildren(...files.map((file) => {
      const isWrong = file.status === "error", note = make("small", { className: isWrong ? "error" : "quiet" }, isWrong ? file.status_details : size(file.bytes));
      const again = button("Use", `Use ${file.filename}`, () => use(file));
      again.disabled = isWrong;
      return make("li", { className: "row" }, make("span", {}, file.filename, " ", note), again, button("Delete", `Delete ${file.filename}`, () => removeFile(file)));
    }));
  }

  async function removeFile(file) {
    try {
      await api(`/v1/files/${encodeURIComponent(file.id)}`, { method: "DELETE" });
      if (state.file && state.file.id === file.id) startUpload();
      say("file-said", `${file.filename} was deleted.`);
      at("file").focus();
      loadFiles();
    } catch (error) {
      say("file-said", error.message, "error");
    }
  }

  // --- the settings ---

  const isDocument = () => state.file !== null && state.file.purpose === "document";

  function showSetup() {
    at("start").disabled = state.file === null;
    say("start-said", state.file ? "" : "Choose a file first.");
    at("validation").hidden = isDocument();
    at("questions").hidden = !isDocument();
  }

  /** What a training may start from. */
  function showBases() {
    const chosen = at("base").value, prefixes = state.models.filter(({ kind }) => kind === "prefix").map(({ id }) => id);
    const bases = [state.backbone, ...prefixes].filter(Boolean);
    at("base").replaceChildren(...bases.map((id) => make("option", { value: id }, id === state.backbone ? `${id} (new)` : id)));
    if (bases.includes(chosen)) at("base").value = chosen;
  }

  /** The id of a further file; it is sent once. Null: none was chosen. */
  async function attached(id) {
    const file = at(id).files[0];
    if (!file) return null;
    if (!state.sent.has(file)) state.sent.set(file, await send(file, "fine-tune"));
    return state.sent.get(file).id;
  }

  async function requestBody() {
    const own = {}, hyperparameters = {}, body = { model: at("base").value || state.backbone, training_file: state.file.id, prefixtune: own };
    const put = (target, name, id) => { if (at(id).value !== "") target[name] = Number(at(id).value); };
    put(hyperparameters, "n_epochs", "epochs");
    put(hyperparameters, "learning_rate_multiplier", "rate");
    put(own, "prefix_length", "prefix-length");
    put(body, "seed", "seed");
    if (at("name").value) own.name = at("name").value;
    if (!at("read-as").hidden) own.form = at("form").value;
    if (Object.keys(hyperparameters).length) body.method = { type: "supervised", supervised: { hyperparameters } };
    const more = await attached(isDocument() ? "questions-file" : "validation-file");
    if (more && isDocument()) own.questions = more;
    else if (more) body.validation_file = more;
    return body;
  }

  async function start() {
    at("start").disabled = true;
    say("start-said", "The job is being created …");
    try {
      const job = await postJson("/v1/fine_tuning/jobs", await requestBody());
      say("start-said", "Started.");
      at("name").value = "";
      open(job);
    } catch (error) {
      say("start-said", error.message, "error");
    }
    at("start").disabled = state.file === null;
  }

  // --- jobs ---

  const pathOf = (job, more = "") => `/v1/fine_tuning/jobs/${encodeURIComponent(job.id)}${more}`;
  const ownOf = (job) => job.prefixtune || {};
  const nameOf = (job) => job.fine_tuned_model || ownOf(job).name || job.id;
  const current = () => state.jobs.find(({ id }) => id === state.id);
  /** Whether the result answers. It may have been deleted, and another job's may have its name by now. */
  const answers = (job) => job.status === "succeeded" && state.models.some((model) => model.id === nameOf(job) && (!model.job || model.job === job.id));

  async function loadModels() {
    state.models = (await getJson("/v1/models")).data;
  }

  const look = keepLooking(async () => {
    const page = await getJson(`/v1/fine_tuning/jobs?limit=${state.limit}`), jobs = page.data;
    if (!state.isKnown || jobs.some((job) => job.status === "succeeded" && isUnfinished(job.id))) {
      await Promise.all([loadModels(), loadFiles()]);
      state.isKnown = true;
    }
    // Not every key sees the backbone among the models.
    state.backbone = (page.prefixtune || {}).backbone || "";
    if (state.id && !jobs.some(({ id }) => id === state.id)) {
      const named = await getJson(pathOf(state)).catch((error) => { if (error.status === 404) return null; throw error; });
      if (named) jobs.push(named);
      else state.id = "";
    }
    state.jobs = jobs;
    if (!state.id && jobs.length) state.id = (jobs.find((job) => !ENDED.includes(job.status)) || jobs[0]).id;
    history.replaceState(null, "", `#${state.id}`);
    say("server", `training on ${state.backbone || "one backbone"}`);
    showBases();
    showList(page.has_more);
    if (current()) await showJob(current());
    return jobs.some(({ status }) => status === "running" || status === "queued") ? RUNNING_MS : IDLE_MS;
  });

  const isUnfinished = (id) => state.jobs.some((job) => job.id === id && !ENDED.includes(job.status));

  function open(job) {
    state.id = job.id;
    at("job").hidden = false;
    say("job-title", nameOf(job));
    at("job").focus();
    look();
  }

  function showList(hasMore) {
    at("more-jobs").hidden = !hasMore || state.limit >= MAX_LISTED;
    say("list-said", state.jobs.length ? "" : "No jobs yet.", "quiet");
    // A list that is the same stays, with what is selected or read in it.
    const drawn = JSON.stringify([state.id, ...state.jobs.map((job) => [job.id, nameOf(job), stand(job)])]);
    if (drawn === state.drawn) return;
    state.drawn = drawn;
    const box = at("jobs"), focused = box.contains(document.activeElement) ? document.activeElement.value : "";
    box.replaceChildren(...state.jobs.map((job) => {
      const row = make("button", { type: "button", value: job.id, ariaCurrent: String(job.id === state.id) });
      row.append(make("b", {}, nameOf(job)), make("span", { className: job.status }, stand(job)), make("small", { className: "quiet" }, new Date(1000 * job.created_at).toLocaleString([], { dateStyle: "short", timeStyle: "short" })));
      row.addEventListener("click", () => open(job));
      return make("li", {}, row);
    }));
    for (const row of box.querySelectorAll("button")) if (row.value === focused) row.focus();
  }

  function stand(job) {
    const { progress, position } = ownOf(job);
    if (job.status === "running" && progress && progress.total_steps) return `running, ${Math.floor((100 * progress.step) / progress.total_steps)} %`;
    return job.status === "queued" && position ? `queued, ${position} before it` : job.status;
  }

  // --- one job ---

  async function showJob(job) {
    const { step = 0, total_steps: total = 0, seconds_left: left } = ownOf(job).progress || {}, hasEnded = ENDED.includes(job.status);
    at("job").hidden = false;
    say("job-title", nameOf(job));
    say("job-said", sayStatus(job), job.status);
    at("bar").hidden = hasEnded;
    at("bar").value = total ? step / total : 0;
    const time = job.status === "running" ? `, ${job.estimated_finish && left !== null ? `${duration(left)} left` : "the time left is known after the next step"}` : "";
    say("bar-text", hasEnded ? "" : total ? `Step ${count(step)} of ${count(total)}${time}` : "The time left is known after the first step.", "quiet");
    at("compare").hidden = !answers(job);
    const shown = [job.id, job.status, answers(job)].join(" ");
    if (shown !== state.shown) {
      state.shown = shown;
      showActions(job);
      showPairs(job);
    }
    compare(job);
    await showEvents(job);
  }

  function sayStatus(job) {
    if (job.status === "failed") return `It failed: ${(job.error || {}).message || "see below."}`;
    if (job.status === "succeeded" && !answers(job)) return `Done, but ${nameOf(job)} was deleted.`;
    return {
      queued: "It waits for its turn.", running: "It trains.", paused: "Paused: nothing is lost.", cancelled: "Cancelled.",
      succeeded: `Done after ${duration(job.finished_at - job.created_at)}. ${nameOf(job)} answers now.`,
    }[job.status] || `${job.status}.`;
  }

  function duration(seconds) {
    if (seconds < 90) return `${Math.max(1, Math.ceil(seconds))} s`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} minutes` : `${(seconds / 3600).toFixed(1)} hours`;
  }

  function showActions(job) {
    const box = at("actions"), hadFocus = box.contains(document.activeElement), name = nameOf(job);
    const change = (text, path) => action(text, () => postJson(pathOf(job, `/${path}`)));
    const cancel = action("Cancel", () => confirm(`Cancel ${name}? What it has learned so far is lost.`) && postJson(pathOf(job, "/cancel")));
    const results = () => [
      ...(at("pages") ? [make("a", { className: "button", href: `/#mode=chat&models=${encodeURIComponent(`${name},${state.backbone}`)}` }, "Open in the playground")] : []),
      action("Download", () => download(name)),
      action("Delete", () => confirm(`Delete ${name}? It cannot be brought back.`) && removeModel(name)),
    ];
    const actions = { queued: [change("Pause", "pause"), cancel], running: [change("Pause", "pause"), cancel], paused: [change("Resume", "resume"), cancel] };
    box.replaceChildren(...(answers(job) ? results() : actions[job.status] || []));
    say("action-said", "");
    if (hadFocus) (box.firstElementChild || at("job")).focus();
  }

  /** A button that does something to a job, says what fails, and has the page look again. */
  function action(text, work) {
    const element = button(text, null, async () => {
      element.disabled = true;
      try {
        await work();
        await look();
      } catch (error) {
        say("action-said", error.message, "error");
      }
      element.disabled = false;
    });
    return element;
  }

  async function download(name) {
    const response = await api(`/v1/models/${encodeURIComponent(name)}/file`), url = URL.createObjectURL(await response.blob());
    make("a", { href: url, download: `${name}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  async function removeModel(name) {
    await api(`/v1/models/${encodeURIComponent(name)}`, { method: "DELETE" });
    await loadModels();
  }

  // --- events ---

  async function showEvents(job) {
    if (!state.events.has(job.id)) state.events.set(job.id, new Map());
    const events = state.events.get(job.id);
    let after = "", fresh = [], hasMore = true;
    // The newest come first. Pages of known ones are not read again.
    for (let page = 0; hasMore && page < MAX_EVENT_PAGES; page++) {
      const found = await getJson(pathOf(job, `/events?limit=100${after}`));
      const isNew = found.data.filter(({ id }) => !events.has(id));
      fresh = [...fresh, ...isNew];
      hasMore = found.has_more && isNew.length === found.data.length;
      after = `&after=${encodeURIComponent(found.last_id)}`;
    }
    for (const event of fresh.reverse()) events.set(event.id, event);
    if (job.id !== state.id) return;
    const all = [...events.values()], lossOf = (name) => all.filter(({ data }) => Number.isFinite((data || {})[name])).map(({ data }) => [data.step, data[name]]);
    drawCurve(lossOf("train_loss"), lossOf("valid_loss"), (ownOf(job).progress || {}).total_steps || 1);
    const messages = all.filter(({ type }) => type !== "metrics").slice(-100).reverse();
    at("events").replaceChildren(...messages.map(({ created_at: created, level, message }) =>
      make("li", { className: level === "error" ? "error" : "" }, make("time", { className: "quiet" }, new Date(1000 * created).toLocaleTimeString()), ` ${message}`)));
  }

  /** Draw the losses over the steps, and say them in words. Points are [step, nats per token]. */
  function drawCurve(train, valid, steps) {
    at("curve").hidden = train.length < 2;
    if (at("curve").hidden) return;
    const losses = [...train, ...valid].map(([, loss]) => loss).sort((one, other) => one - other);
    // A few wild first steps would flatten all others.
    const low = losses[0], top = Math.max(losses[Math.ceil(0.98 * (losses.length - 1))], low + 1e-6), every = Math.ceil(train.length / MAX_POINTS);
    const place = ([step, loss]) => `${((600 * step) / steps).toFixed(1)},${(176 - 172 * Math.min(1, (loss - low) / (top - low))).toFixed(1)}`;
    for (const [name, points] of Object.entries({ train, valid })) {
      const kept = points.filter((_, index) => index % every === 0 || index === points.length - 1);
      at("curve").querySelector(`.${name}`).setAttribute("points", kept.map(place).join(" "));
    }
    const best = valid.length ? `; on the validation examples (dashed) ${Math.min(...valid.map(([, loss]) => loss)).toFixed(3)} at best` : "";
    say("curve-text", `Loss ${train.at(-1)[1].toFixed(3)} at step ${train.at(-1)[0]} of ${steps}, ${train[0][1].toFixed(3)} at step ${train[0][0]}${best}. In nats per token, drawn from ${low.toFixed(2)} to ${top.toFixed(2)}.`, "quiet");
  }

  // --- before and after ---

  /** Ask the model that a job began with, and its result, what was not asked yet. A failure that may pass is asked again at the next look. */
  async function compare(job) {
    if (!answers(job) || state.asking === job.id) return;
    state.asking = job.id;
    try {
      if (!state.asked.has(job.id)) state.asked.set(job.id, (await questionsOf(job)).map((messages) => ({ messages })));
      for (const pair of state.asked.get(job.id)) {
        for (const [side, model] of [["before", job.model], ["after", nameOf(job)]]) {
          if (pair[side]) continue;
          const text = await answer(model, pair.messages);
          if (state.asking !== job.id) return;
          pair[side] = text;
          showPairs(job);
        }
      }
      say("compare-said", "");
    } catch (error) {
      say("compare-said", error.message, "error");
    }
    if (state.asking === job.id) state.asking = "";
  }

  function showPairs(job) {
    if (job.id !== state.id) return;
    const cell = (name, text, className = "") => make("div", {}, make("dt", {}, name), make("dd", { className: text ? className : "quiet" }, text || "…"));
    at("pairs").replaceChildren(...(state.asked.get(job.id) || []).map(({ messages, before, after }) =>
      make("li", {}, make("p", { className: "scroll" }, messages.at(-1).content), make("dl", {}, cell(job.model, before), cell(nameOf(job), after, "new")))));
  }

  /** Three questions of a job's examples, spread over the file; of a document, the usual ones. */
  async function questionsOf(job) {
    if (ownOf(job).kind === "document") return DOCUMENT_QUESTIONS.map((content) => [{ role: "user", content }]);
    const preview = await getJson(`/v1/files/${encodeURIComponent(job.training_file)}/preview`).catch(unlessLasting({}));
    const all = (preview.examples || []).map(questionOf).filter(Boolean), wanted = Math.min(3, all.length);
    return Array.from({ length: wanted }, (_, index) => all[Math.floor((index * all.length) / wanted)]);
  }

  /** The messages of an example up to its last question. */
  function questionOf({ messages, source }) {
    if (!messages) return source ? [{ role: "user", content: source }] : null;
    const last = messages.map(({ role }) => role).lastIndexOf("user");
    return last < 0 ? null : messages.slice(0, last + 1).map(({ role, content }) => ({ role, content }));
  }

  /** For a failure: a value if the same request would fail again, and else the failure. */
  const unlessLasting = (value) => (error) => {
    if (error.status >= 400 && error.status < 500 && ![401, 408, 429].includes(error.status)) return value || `(${error.message})`;
    throw error;
  };

  /** A model's answer, or why there is none. A model without a chat template continues the text; a classifier labels it. */
  async function answer(model, messages) {
    const options = { model, max_tokens: MAX_ANSWER, temperature: 0 }, { content } = messages.at(-1);
    const ways = [
      async () => (await postJson("/v1/chat/completions", { ...options, messages })).choices[0].message.content,
      async () => (await postJson("/v1/chat/completions", { ...options, messages: messages.slice(-1) })).choices[0].message.content,
      async () => (await postJson("/v1/completions", { ...options, prompt: content })).choices[0].text,
      async () => (await postJson("/classify", { model, input: content })).data[0].label,
    ];
    let first = null;
    for (const way of ways) {
      try {
        return (await way()).trim() || "(an empty text)";
      } catch (error) {
        first = first || error;
        if (error.status !== 400) return unlessLasting()(error);
      }
    }
    return `(${first.message})`;
  }

  function ask() {
    const job = current(), content = at("own").value.trim();
    if (!job || !content || !state.asked.has(job.id)) return;
    at("own").value = "";
    state.asked.get(job.id).push({ messages: [{ role: "user", content }] });
    showPairs(job);
    compare(job);
  }

  // --- start ---

  const drop = at("drop");
  drop.addEventListener("dragover", () => { drop.className = "over"; });
  drop.addEventListener("dragleave", () => { drop.className = ""; });
  drop.addEventListener("drop", (event) => {
    drop.className = "";
    const { files } = event.dataTransfer;
    if (files.length > 1) say("file-said", "One file at a time, please.", "error");
    else if (files.length) take(files[0]);
  });
  // A file that misses the field does not replace the page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
  at("file").addEventListener("change", () => { if (at("file").files.length) take(at("file").files[0]); });
  at("paste").addEventListener("click", () => take(pasted()));
  at("stop-upload").addEventListener("click", () => state.upload.abort());
  at("more-jobs").addEventListener("click", () => { state.limit = Math.min(MAX_LISTED, state.limit + PAGE); look(); });
  at("setup").addEventListener("submit", (event) => { event.preventDefault(); start(); });
  // In closed details the browser shows nothing of a wrong value.
  at("setup").addEventListener("invalid", () => { at("settings").open = true; }, true);
  at("compare").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  submitByKey(at("compare"));
  useKeyForm();
  look();
})();
