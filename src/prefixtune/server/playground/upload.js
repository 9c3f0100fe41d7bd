"use strict";
// Files: sent with progress, read by the server, shown.

const DOCUMENT = /\.(txt|text|md|markdown|rst)$/i;
/** Asked before and after about a document, unless others are written. */
const DOCUMENT_QUESTIONS = ["What is this text about?", "Who or what does it name first?", "What happens in it?"];
const purposeOf = (file) => (DOCUMENT.test(file.name) ? "document" : "fine-tune");
const factsOf = (file) => file.prefixtune || {};

/**
 * Send a file.
 * @param progress called with the share that is sent, and then with 1 while the server reads
 * @returns { done, stop }: done gives the server's file, or fails as a sentence
 */
function sendFile(file, purpose, progress) {
  const request = new XMLHttpRequest(), form = new FormData();
  form.append("purpose", purpose);
  form.append("file", file, file.name);
  const done = new Promise((resolve, reject) => {
    request.upload.addEventListener("progress", (event) => progress(event.total ? event.loaded / event.total : 1));
    request.addEventListener("load", () => {
      let body = null;
      try { body = JSON.parse(request.responseText); } catch { /* no JSON: the status says it */ }
      if (request.status < 300 && body) resolve(body);
      else reject(apiError(request.status, body));
    });
    request.addEventListener("error", () => reject(new Error("the server closed the connection while the file was sent.")));
    request.addEventListener("abort", () => reject(Object.assign(new Error("stopped."), { name: "AbortError" })));
  });
  request.open("POST", "/v1/files");
  for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
  request.send(form);
  return { done, stop: () => request.abort() };
}

/** Have a further file sent as soon as it is chosen; `taken` gets it, or null. */
function attachFile(input, said, taken) {
  let sending = null;
  input.addEventListener("change", async () => {
    if (sending) sending.stop();
    sending = null;
    taken(null);
    const file = input.files[0];
    said.className = "quiet";
    said.textContent = "";
    if (!file) return;
    const mine = sending = sendFile(file, "fine-tune", (share) => { said.textContent = share < 1 ? `${Math.floor(100 * share)} % sent` : "the server reads it …"; });
    try {
      const stored = await mine.done;
      if (stored.status === "error") throw new Error(stored.status_details);
      said.textContent = factsOf(stored).summary || stored.filename;
      taken(stored);
    } catch (error) {
      if (mine !== sending) return;
      said.className = "error";
      said.textContent = error.message;
    }
  });
}

const count = (number) => Number(number).toLocaleString("en");
const bytes = (number) => (number < 2 ** 20 ? `${Math.ceil(number / 1024)} KiB` : `${(number / 2 ** 20).toFixed(1)} MiB`);

/** What the server read: counts, one example, lengths. */
function showRead(file, preview) {
  const facts = factsOf(file), examples = preview.examples || [];
  const figures = facts.form === "document"
    ? [["characters", count(facts.characters)], ["size", bytes(file.bytes)]]
    : [["rows", count(facts.rows)], ["examples", count(facts.examples)], ["targets", count(facts.targets)], ["size", bytes(file.bytes)]];
  at("facts").replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  at("read-as").hidden = (facts.forms || []).length < 2 || Boolean(facts.form);
  at("form").replaceChildren(...(facts.forms || []).map((form) => make("option", { value: form, textContent: form })));
  showSample(examples[0], facts);
  const lengths = preview.lengths || {};
  drawLengths(at("lengths"), lengths.counts || [], lengths.edges || [], lengths.unit || "tokens");
  at("cuts").textContent = preview.cuts || "";
  at("read").hidden = false;
}

function showSample(example, facts) {
  at("sample").hidden = !example;
  if (!example) return;
  const parts = partsOf(example).map(({ role, text, trained }) =>
    make("p", {}, ...(role ? [make("b", {}, `${role}: `)] : []), trained ? make("mark", {}, text) : text));
  at("sample-text").replaceChildren(...parts);
  at("sample").firstElementChild.replaceChildren(...(facts.form === "document" ? ["The beginning of it"] : ["One example: ", make("mark", {}, "the model learns to write what is marked")]));
}

/** The texts of an example, in order, and which are learned. */
function partsOf(example) {
  if (example.messages) {
    return example.messages.map(({ role, content, trained }) => ({ role, text: content, trained: trained === undefined ? role === "assistant" : trained }));
  }
  const targets = example.targets || (example.target ? [example.target] : []);
  return [...(example.source ? [{ text: example.source }] : []), ...targets.slice(0, 3).map((text) => ({ text, trained: true }))];
}

/** What is asked before and after: messages up to the first answer that is learned. */
function questionOf(example) {
  if (!example.messages) return example.source ? [{ role: "user", content: example.source }] : null;
  const last = example.messages.map(({ role }) => role).lastIndexOf("user");
  return last < 0 ? null : example.messages.slice(0, last + 1).map(({ role, content }) => ({ role, content }));
}

/** Three of the preview's examples to ask about: different ones, spread over it. */
function questionsOf(examples) {
  const questions = new Map(examples.map(questionOf).filter(Boolean).map((messages) => [JSON.stringify(messages), messages]));
  const all = [...questions.values()], wanted = Math.min(3, all.length);
  return Array.from({ length: wanted }, (_, index) => all[Math.floor((index * all.length) / wanted)]);
}
