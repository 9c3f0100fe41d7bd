"use strict";
(() => {
  const MAX_SHOWN = 200, MAX_CHOSEN = 8, MAX_SLOTS = 256, COLORS = 8;
  const ABOUT = {
    fields: "The fields of the prefix's task. The file of the prefix says how they become its source.",
    source: "The source as one text. It is put into the text format of the prefix.",
    prompt: "The text as it is. Nothing is added.",
    chat: "One message, in the chat template of the model.",
  };
  const state = { models: [], chosen: [], tasks: new Map(), colors: new Map(), control: null, form: "", read: null, turn: 0, seen: null };

  /** The color of a model: the next one for each new name. */
  function color(name) {
    if (!state.colors.has(name)) state.colors.set(name, `k${state.colors.size % COLORS}`);
    return state.colors.get(name);
  }

  /** What the page's address names, as in /#mode=chat&models=a,b. */
  const named = (what) => new URLSearchParams(location.hash.slice(1)).get(what) || "";
  const mode = () => document.querySelector("[name=mode]:checked").value;
  const backbone = () => (state.models.find((model) => model.kind === "backbone") || {}).id;

  /** The models that write: the chosen ones, or all chosen prefixes joined into one. */
  function writers() {
    const prefixes = state.chosen.filter((name) => name !== backbone());
    if (!at("join").checked || prefixes.length < 2) return state.chosen;
    return [prefixes.join("+"), ...state.chosen.filter((name) => name === backbone())];
  }

  // --- models ---

  async function loadModels() {
    const { data } = await getJson("/v1/models");
    const names = data.map((model) => model.id), first = data.find((model) => model.task) || data[1] || data[0];
    state.models = data;
    state.chosen = named("models").split(",").filter((name) => names.includes(name)).slice(0, MAX_CHOSEN);
    if (!state.chosen.length && first) state.chosen = [first.id];
    showModels();
    await showInputs();
  }

  function showModels() {
    const filter = at("filter").value.trim().toLowerCase();
    const matching = state.models.filter((model) => `${model.id} ${model.task || ""}`.toLowerCase().includes(filter)).slice(0, MAX_SHOWN);
    at("models").replaceChildren(...matching.map((model) => {
      const box = make("input", { type: "checkbox", value: model.id, checked: state.chosen.includes(model.id) });
      box.addEventListener("change", () => choose(box));
      const task = make("small", {}, model.task || (model.kind === "backbone" ? "no prefix" : ""));
      return make("li", {}, make("label", { title: model.description }, box, make("span", {}, model.id, " ", task)));
    }));
    showCount();
  }

  function showCount() {
    const joined = writers().find((name) => name.includes("+") && !state.chosen.includes(name));
    say("count", `${state.chosen.length} of ${state.models.length} chosen${joined ? `, joined: ${joined.replaceAll("+", " + ")}` : ""}`, "quiet");
  }

  function choose(box) {
    if (box.checked && state.chosen.length >= MAX_CHOSEN) {
      box.checked = false;
      say("said", `At most ${MAX_CHOSEN} models at once.`);
      return;
    }
    state.chosen = box.checked ? [...state.chosen, box.value] : state.chosen.filter((name) => name !== box.value);
    showCount();
    showInputs();
  }

  /** The task of the form: that of the first model with fields of its own. */
  async function formTask() {
    for (const name of writers()) {
      if (!state.tasks.has(name)) {
        try {
          state.tasks.set(name, await getJson(`/v1/tasks/${encodeURIComponent(name)}`));
        } catch {
          continue;
        }
      }
      if (state.tasks.get(name).fields.length) return state.tasks.get(name);
    }
    return null;
  }

  // --- the input ---

  async function showInputs() {
    const kind = mode(), turn = ++state.turn, task = kind === "fields" ? await formTask() : null;
    // The choice has changed meanwhile.
    if (turn !== state.turn) return;
    say("about", kind === "fields" && !task ? "The chosen models have no fields. Choose another model or another kind of input." : ABOUT[kind], "quiet");
    const form = JSON.stringify([kind, task && task.fields]);
    // What was written stays.
    if (form === state.form) return;
    state.form = form;
    at("inputs").replaceChildren();
    if (kind === "fields") {
      const fields = (task ? task.fields : []).map((field) => [field.name, addField(field)]);
      state.read = () => ({ fields: Object.fromEntries(fields.map(([name, read]) => [name, read()])) });
    } else if (kind === "chat") {
      const system = addText("System", "", false), user = addText("User", "Hello!");
      state.read = () => ({ messages: [...(system() ? [{ role: "system", content: system() }] : []), { role: "user", content: user() }] });
    } else {
      const text = addText(kind === "prompt" ? "Prompt" : "Source", "");
      state.read = () => ({ [kind]: text() });
    }
  }

  function addText(label, value, isLong = true) {
    const input = make(isLong ? "textarea" : "input", { value });
    at("inputs").append(make("label", {}, label, input));
    return () => input.value;
  }

  function addField({ name, kind, example, parts }) {
    if (kind === "triples") {
      const lines = example.map((triple) => triple.join(" | ")).join("\n");
      const read = addText(`${name}: subject | property | object, one triple a line`, lines);
      return () => read().split("\n").filter((line) => line.trim()).map((line) => line.split("|").map((part) => part.trim()));
    }
    return addText(kind === "attributes" ? `${name}: some of ${parts.join(", ")}` : name, String(example), kind !== "line");
  }

  function sampling() {
    const numbers = ["temperature", "top_p", "top_k", "seed", "max_tokens"].filter((name) => at(name).value !== "");
    const options = Object.fromEntries(numbers.map((name) => [name, Number(at(name).value)]));
    return at("stop").value ? { ...options, stop: at("stop").value } : options;
  }

  // --- requests ---

  async function run() {
    if (state.control) return;
    if (!state.chosen.length || !state.read) { say("said", "Choose a model first."); return; }
    state.control = new AbortController();
    const cards = writers().map(card), input = state.read(), options = { ...sampling(), stream: true };
    at("outputs").replaceChildren(...cards.map(({ element }) => element));
    at("run").disabled = true;
    at("halt").disabled = false;
    say("said", `Writing with ${cards.length} ${cards.length === 1 ? "model" : "models"} …`);
    look();
    const task = await formTask(), format = task ? task.id : writers().find((name) => name !== backbone());
    const ends = await Promise.all(cards.map((card) => write(card, requestFor(card.name, input, options, format))));
    state.control = null;
    at("run").disabled = false;
    at("halt").disabled = true;
    const failed = ends.filter((end) => end === "failed").length;
    say("said", failed ? `${failed} of ${cards.length} failed.` : "Done.");
  }

  function card(name) {
    const text = make("p", { className: "text" }), facts = make("p", { className: "quiet" }, "waiting");
    const element = make("article", { className: `sheet output ${color(name)}`, ariaLabel: `Output of ${name}`, ariaBusy: "true" }, make("h3", {}, name), text, facts);
    return { name, element, text, facts };
  }

  function requestFor(name, input, options, format) {
    const usage = { stream_options: { include_usage: true } };
    if ("prompt" in input) return ["/v1/completions", { model: name, ...input, ...options, ...usage }];
    if ("messages" in input) return ["/v1/chat/completions", { model: name, ...input, ...options, ...usage }];
    // The bare backbone gets the same text as a prefix.
    return [`/v1/tasks/${encodeURIComponent(name)}`, { ...input, ...options, ...(name === backbone() && format ? { format_of: format } : {}) }];
  }

  /** Stream one output; returns how it ended. */
  async function write({ element, text, facts }, [path, body]) {
    const started = performance.now(), seconds = () => (performance.now() - started) / 1000;
    let first = 0, tokens = 0, reason = "", end = "complete";
    try {
      for await (const event of events(await api(path, { method: "POST", body: JSON.stringify(body), signal: state.control.signal }))) {
        if (event.error) throw new Error(event.error.message);
        const choice = (event.choices || [])[0] || {}, piece = event.delta || choice.text || (choice.delta || {}).content || "";
        if (piece && !first) first = seconds();
        if (event.output === undefined) text.append(piece);
        else text.textContent = event.output;
        tokens = event.usage ? event.usage.completion_tokens : tokens;
        reason = event.finish_reason || choice.finish_reason || reason;
      }
      facts.textContent = `${tokens} tokens · ${(tokens / seconds()).toFixed(0)} a second · first after ${(1000 * first).toFixed(0)} ms · ${reason === "length" ? "reached its length limit" : end}`;
    } catch (error) {
      end = error.name === "AbortError" ? "stopped" : "failed";
      facts.textContent = end;
      if (end === "failed") text.append(make("span", { className: "error" }, error.message));
    }
    element.ariaBusy = "false";
    return end;
  }

  /** The server-sent events of a response, as objects. */
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Error("The connection was lost.");
      });
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part === "data: [DONE]") ended = true;
        else if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
      }
    }
    if (!ended) throw new Error("The connection was lost.");
  }

  // --- the running batch ---

  function showBatch(now) {
    const prefixes = state.models.filter((model) => model.kind !== "backbone").length, before = state.seen || now;
    say("server", `${prefixes} ${prefixes === 1 ? "prefix" : "prefixes"} on ${backbone() || "one backbone"}${now.draining ? ", shutting down" : ""}`, now.draining ? "error" : "");
    const slots = Array.from({ length: Math.min(now.slots, MAX_SLOTS) }, () => make("li")), counts = new Map();
    for (const { slot, model, new_tokens: tokens } of now.running) {
      const name = model || "another model";
      counts.set(name, (counts.get(name) || 0) + 1);
      if (slots[slot]) Object.assign(slots[slot], { className: `busy ${color(name)}`, title: `slot ${slot}: ${name}, ${tokens} tokens` });
    }
    at("slots").replaceChildren(...slots);
    at("legend").replaceChildren(...[...counts].map(([name, count]) => make("li", {}, make("i", { className: color(name) }), `${name} × ${count}`)));
    const seconds = now.seconds - before.seconds, lookups = now.cache.hits + now.cache.misses;
    showFigures("figures", [
      ["running", `${now.running.length} of ${now.slots}`],
      ["waiting", now.waiting],
      ["tokens a second", seconds > 0 ? Math.max(0, (now.tokens - before.tokens) / seconds).toFixed(0) : 0],
      ["prefixes in memory", now.cache.prefixes],
      ["cache hits", lookups ? `${Math.round(100 * now.cache.hits / lookups)} %` : "–"],
    ]);
    state.seen = now;
  }

  // --- start ---

  const look = keepLooking(async () => {
    if (!state.models.length) await loadModels();
    showBatch(await getJson("/v1/status"));
    return state.control ? 300 : 1500;
  });
  useKeyForm();
  submitByKey(at("ask"));
  at("filter").addEventListener("input", showModels);
  // Enter in the filter does not start a request.
  at("filter").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) event.preventDefault(); });
  at("join").addEventListener("change", () => { showCount(); showInputs(); });
  at("modes").addEventListener("change", showInputs);
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  at("halt").addEventListener("click", () => state.control.abort());
  for (const choice of document.querySelectorAll("[name=mode]")) choice.checked = choice.checked || choice.value === named("mode");
  look();
})();
