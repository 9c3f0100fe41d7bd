"use strict";
(() => {
  const MAX_SHOWN = 200, MAX_CHOSEN = 8;
  const DESCRIPTIONS = {
    fields: "The task's own fields; the prefix's file says how they become its source.",
    source: "A linearized source; it is put into the prefix's text format.",
    prompt: "The text as it is, after the prefix: nothing is added.",
    chat: "One message, in the backbone's chat template.",
  };
  const state = { models: [], chosen: [], tasks: new Map(), runs: [], running: 0, failed: false, form: "", read: null, turn: 0 };

  // --- helpers ---

  function color(name) {
    const index = models().indexOf(name);
    if (index >= 0) return `k${index % 8}`;
    let sum = 0;
    for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 65521;
    return `k${sum % 8}`;
  }

  const mode = () => document.querySelector("[name=mode]:checked").value;
  const backbone = () => (state.models.find((model) => model.kind === "backbone") || {}).id;

  /** What is written with: the chosen models, each by itself, or all chosen prefixes joined. */
  function models() {
    const prefixes = state.chosen.filter((name) => name !== backbone());
    if (!at("join").checked || prefixes.length < 2) return state.chosen;
    return [prefixes.join("+"), ...state.chosen.filter((name) => name === backbone())];
  }

  // --- models ---

  async function loadModels() {
    try {
      state.models = (await (await api("/v1/models")).json()).data;
      state.failed = false;
    } catch (error) {
      state.models = [];
      state.failed = true;
      showServer(error.message, true);
    }
    const names = state.models.map((model) => model.id);
    state.chosen = state.chosen.filter((name) => names.includes(name));
    if (!state.chosen.length) state.chosen = namedModels().filter((name) => names.includes(name));
    const first = state.models.find((model) => model.task) || state.models[1] || state.models[0];
    if (!state.chosen.length && first) state.chosen = [first.id];
    showModels();
    await showInputs();
  }

  /** What the page's address names, as in /#mode=chat&models=a,b. */
  const named = (what) => new URLSearchParams(location.hash.slice(1)).get(what) || "";
  const namedModels = () => named("models").split(",").slice(0, MAX_CHOSEN);

  function showModels() {
    const filter = at("filter").value.trim().toLowerCase();
    const matching = state.models.filter((model) => `${model.id} ${model.task || ""}`.toLowerCase().includes(filter));
    at("models").replaceChildren(...matching.slice(0, MAX_SHOWN).map((model) => {
      const box = make("input", { type: "checkbox", value: model.id, checked: state.chosen.includes(model.id) });
      box.addEventListener("change", () => choose(box));
      const task = make("small", {}, model.task || (model.id === backbone() ? "no prefix" : ""));
      return make("li", {}, make("label", { title: model.description }, box, make("span", {}, model.id, " ", task)));
    }));
    const more = matching.length > MAX_SHOWN ? `, ${MAX_SHOWN} shown` : "";
    at("count").textContent = `${state.chosen.length} chosen of ${matching.length}${more}${joined()}`;
  }

  /** The names of the prefixes that are joined. */
  function joined() {
    const names = models().filter((name) => name !== backbone() && !state.chosen.includes(name));
    return names.length ? `, joined: ${names[0].replaceAll("+", " + ")}` : "";
  }

  async function choose(box) {
    if (box.checked && state.chosen.length >= MAX_CHOSEN) {
      box.checked = false;
      showMessage(`At most ${MAX_CHOSEN} models at once.`);
      return;
    }
    state.chosen = box.checked ? [...state.chosen, box.value] : state.chosen.filter((name) => name !== box.value);
    at("count").textContent = `${state.chosen.length} chosen of ${state.models.length}${joined()}`;
    await showInputs();
  }

  async function taskOf(name) {
    if (!state.tasks.has(name)) {
      const path = `/v1/tasks/${encodeURIComponent(name)}`;
      state.tasks.set(name, await (await api(path)).json().catch(() => ({ fields: [] })));
    }
    return state.tasks.get(name);
  }

  /** The task of the form: that of the first model with fields of its own. */
  async function formTask() {
    for (const name of models()) {
      const task = await taskOf(name).catch(() => ({ fields: [] }));
      if (task.fields.length) return task;
    }
    return null;
  }

  // --- the form ---

  async function showInputs() {
    const kind = mode(), turn = ++state.turn;
    const task = kind === "fields" ? await formTask() : null;
    // The choice has changed meanwhile.
    if (turn !== state.turn) return;
    at("about").textContent = kind === "fields" && !task ? "None of the chosen models has fields of its own: choose another one, or another kind of input." : DESCRIPTIONS[kind];
    const form = JSON.stringify([kind, task && task.fields]);
    if (form === state.form) return;
    state.form = form;
    const box = at("inputs");
    box.replaceChildren();
    if (kind === "fields") {
      const readers = (task ? task.fields : []).map((field) => [field.name, addField(box, field)]);
      state.read = () => ({ fields: Object.fromEntries(readers.map(([name, read]) => [name, read()])) });
    } else if (kind === "chat") {
      const system = addText(box, "System", "", false), user = addText(box, "User", "Hello!", true);
      state.read = () => ({ messages: [...(system() ? [{ role: "system", content: system() }] : []), { role: "user", content: user() }] });
    } else {
      const text = addText(box, kind === "prompt" ? "Prompt" : "Source", "", true);
      state.read = () => ({ [kind]: text() });
    }
  }

  function addText(box, label, value, long) {
    const input = make(long ? "textarea" : "input", { value: String(value) });
    box.append(make("label", {}, label, input));
    return () => input.value;
  }

  function addField(box, field) {
    if (field.kind === "attributes") return addAttributes(box, field);
    if (field.kind === "triples") return addTriples(box, field);
    return addText(box, field.name, field.example, field.kind === "text");
  }

  function addAttributes(box, field) {
    const values = new Map([...field.example.matchAll(/([^\[\],]+)\[([^\]]*)\]/g)].map((pair) => [pair[1].trim(), pair[2]]));
    const inputs = field.parts.map((name) => {
      const input = make("input", { value: values.get(name) || "" });
      box.append(make("label", { className: "pair" }, name, input));
      return [name, input];
    });
    return () => inputs.filter(([, input]) => input.value.trim()).map(([name, input]) => `${name}[${input.value.trim()}]`).join(", ");
  }

  function addTriples(box, field) {
    const rows = make("div", { role: "group" });
    rows.setAttribute("aria-label", field.name);
    const add = (parts) => {
      const inputs = ["subject", "property", "object"].map((name, index) => {
        const input = make("input", { value: parts[index] || "", placeholder: name });
        input.setAttribute("aria-label", name);
        return input;
      });
      const remove = make("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", "remove this triple");
      const row = make("div", { className: "triple" }, ...inputs, remove);
      remove.addEventListener("click", () => { row.remove(); more.focus(); });
      rows.append(row);
    };
    const more = make("button", { type: "button", textContent: "Add a triple" });
    more.addEventListener("click", () => { add([]); rows.lastElementChild.firstElementChild.focus(); });
    field.example.forEach(add);
    box.append(rows, more);
    return () => [...rows.children].map((row) => [...row.querySelectorAll("input")].map((input) => input.value));
  }

  function sampling() {
    const options = {};
    for (const name of ["temperature", "top_p", "top_k", "seed", "max_tokens"]) {
      if (at(name).value !== "") options[name] = Number(at(name).value);
    }
    if (at("stop").value) options.stop = at("stop").value;
    return options;
  }

  // --- requests ---

  async function run() {
    halt();
    if (!state.chosen.length) { showMessage("Choose a model first."); return; }
    const kind = mode(), input = state.read(), options = { ...sampling(), stream: true };
    const task = kind === "fields" || kind === "source" ? await formTask() : null;
    const other = task ? task.id : models().find((name) => name !== backbone());
    const cards = models().map(card);
    at("outputs").replaceChildren(...cards.map((card) => card.element));
    state.running = cards.length;
    at("run").disabled = true;
    at("halt").disabled = false;
    poll();
    showMessage(`Writing with ${cards.length} ${cards.length === 1 ? "model" : "models"} …`);
    await Promise.all(cards.map((card) => write(card, kind, input, options, other)));
    state.runs = [];
    state.running = 0;
    at("run").disabled = false;
    at("halt").disabled = true;
    const failed = cards.filter((card) => card.failed).length;
    showMessage(failed ? `${failed} of ${cards.length} failed.` : "Done.");
  }

  function card(name) {
    const text = make("p", { className: "text" }), facts = make("div", { className: "facts", textContent: "waiting" });
    const element = make("article", { className: `output ${color(name)}` }, make("h3", {}, name), text, facts);
    element.setAttribute("aria-label", `Output of ${name}`);
    element.setAttribute("aria-busy", "true");
    return { name, element, text, facts, failed: false };
  }

  function requestFor(name, kind, input, options, other) {
    if (kind === "prompt") return ["/v1/completions", { model: name, ...input, ...options, stream_options: { include_usage: true } }];
    if (kind === "chat") return ["/v1/chat/completions", { model: name, ...input, ...options, stream_options: { include_usage: true } }];
    // The bare backbone gets the same text as a prefix.
    const format = name === backbone() && other ? { format_of: other } : {};
    return [`/v1/tasks/${encodeURIComponent(name)}`, { ...input, ...options, ...format }];
  }

  async function write(card, kind, input, options, other) {
    const control = new AbortController();
    state.runs.push(control);
    const started = performance.now();
    let first = 0, usage = null, reason = "";
    try {
      const [path, body] = requestFor(card.name, kind, input, options, other);
      const response = await api(path, { method: "POST", body: JSON.stringify(body), signal: control.signal });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        const choice = (event.choices || [])[0] || {};
        const piece = event.delta || choice.text || (choice.delta || {}).content || "";
        if (piece && !first) first = performance.now() - started;
        if (event.output === undefined) card.text.append(piece);
        else card.text.textContent = event.output;
        usage = event.usage || usage;
        reason = event.finish_reason || choice.finish_reason || reason;
      }
      const seconds = (performance.now() - started) / 1000, tokens = usage ? usage.completion_tokens : 0;
      card.facts.textContent = `${tokens} tokens · ${(tokens / seconds).toFixed(0)} a second · first after ${first.toFixed(0)} ms · ${reason === "length" ? "reached its length limit" : "complete"}`;
    } catch (error) {
      card.failed = error.name !== "AbortError";
      card.facts.textContent = card.failed ? "failed" : "stopped";
      if (card.failed) card.text.append(make("span", { className: "error", textContent: ` ${error.message}` }));
    } finally {
      card.element.setAttribute("aria-busy", "false");
    }
  }

  /** The server-sent events of a response, as objects. */
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part === "data: [DONE]") ended = true;
        else if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
      }
    }
    if (!ended) throw new Error("the connection was lost.");
  }

  function halt() {
    state.runs.forEach((control) => control.abort());
    state.runs = [];
  }

  function showMessage(text) { at("said").textContent = text; }

  // --- the running batch ---

  let previous = null, timer = 0;
  const rates = [];

  async function poll() {
    clearTimeout(timer);
    if (document.visibilityState === "visible") {
      try {
        const now = await (await api("/v1/status")).json();
        // They could not be had before.
        if (state.failed) await loadModels();
        show(now);
      } catch (error) {
        showServer(error.status ? error.message : "the server does not respond.", true);
      }
    }
    clearTimeout(timer);
    timer = setTimeout(poll, state.running ? 300 : 1500);
  }

  function show(now) {
    const count = state.models.filter((model) => model.kind !== "backbone").length;
    if (!state.failed) showServer(`${count} ${count === 1 ? "prefix" : "prefixes"} on ${backbone() || "one backbone"}${now.draining ? " · shutting down" : ""}`, now.draining);
    const slots = at("slots");
    while (slots.children.length < Math.min(now.slots, 256)) slots.append(make("li"));
    for (const cell of slots.children) { cell.className = ""; cell.removeAttribute("title"); }
    const groups = new Map();
    for (const text of now.running) {
      const name = text.model === null ? "other" : text.model;
      groups.set(name, (groups.get(name) || 0) + 1);
      const cell = slots.children[text.slot];
      if (!cell) continue;
      cell.className = `busy ${color(name)}`;
      cell.title = `slot ${text.slot}: ${name}, ${text.new_tokens} tokens`;
    }
    const entries = [...groups].map(([name, texts]) => make("li", {}, make("i", { className: color(name) }), `${name} × ${texts}`));
    at("legend").replaceChildren(...(entries.length ? entries : [make("li", { className: "quiet", textContent: "idle" })]));
    const elapsed = previous ? now.seconds - previous.seconds : 0;
    const tokens = previous ? Math.max(0, now.tokens - previous.tokens) : 0, steps = previous ? Math.max(0, now.steps - previous.steps) : 0;
    const rate = elapsed > 0 ? tokens / elapsed : 0;
    previous = now;
    rates.push(rate);
    if (rates.length > 120) rates.shift();
    const lookups = now.cache.hits + now.cache.misses;
    showFigures([
      ["running", `${now.running.length} of ${now.slots}`],
      ["waiting", now.waiting],
      ["tokens a second", rate.toFixed(0)],
      ["tokens a step", steps ? (tokens / steps).toFixed(1) : "–"],
      ["prefixes in memory", now.cache.prefixes],
      ["cache hits", lookups ? `${Math.round(100 * now.cache.hits / lookups)} %` : "–"],
    ]);
    const highest = Math.max(...rates, 1);
    at("rate").firstElementChild.setAttribute("points", rates.map((value, index) => `${240 - 2 * (rates.length - 1 - index)},${(42 - 40 * value / highest).toFixed(1)}`).join(" "));
  }

  function showFigures(pairs) {
    at("figures").replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  }

  // --- start ---

  useKeyForm(() => {
    state.tasks.clear();
    loadModels();
  });
  at("filter").addEventListener("input", showModels);
  at("join").addEventListener("change", () => { showModels(); showInputs(); });
  at("modes").addEventListener("change", showInputs);
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  at("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); if (!at("run").disabled) run(); }
    // Enter in the filter does not start a request.
    else if (event.key === "Enter" && event.target === at("filter")) event.preventDefault();
  });
  at("halt").addEventListener("click", halt);
  for (const choice of document.querySelectorAll("[name=mode]")) choice.checked = choice.checked || choice.value === named("mode");
  loadModels().then(poll);
})();
