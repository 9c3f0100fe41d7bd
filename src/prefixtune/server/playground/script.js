"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const MOST_SHOWN = 200, MOST_CHOSEN = 8;
  const ABOUT = {
    fields: "The task's own fields; the prefix's file knows how they become its source.",
    source: "A linearized source; the text format of the prefix is put around it.",
    prompt: "The text as it is, after the prefix: nothing is added.",
    chat: "One message, through the backbone's chat template.",
  };
  const state = { models: [], chosen: [], tasks: new Map(), runs: [], running: 0, form: "", read: null, turn: 0 };

  // --- small things ---

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function color(name) {
    const place = state.chosen.indexOf(name);
    if (place >= 0) return `k${place % 8}`;
    let sum = 0;
    for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 65521;
    return `k${sum % 8}`;
  }

  const mode = () => document.querySelector("[name=mode]:checked").value;
  const backbone = () => (state.models.find((model) => model.kind === "backbone") || {}).id;

  async function api(path, options = {}) {
    const key = sessionStorage.getItem("key");
    const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
    if (!answer.ok) {
      const told = await answer.json().catch(() => null);
      const error = new Error(told && told.error ? told.error.message : `HTTP ${answer.status}`);
      error.status = answer.status;
      throw error;
    }
    return answer;
  }

  // --- models ---

  async function loadModels() {
    try {
      state.models = (await (await api("/v1/models")).json()).data;
    } catch (error) {
      state.models = [];
      say(error.message, true);
    }
    const names = state.models.map((model) => model.id);
    state.chosen = state.chosen.filter((name) => names.includes(name));
    const first = state.models.find((model) => model.task) || state.models[1] || state.models[0];
    if (!state.chosen.length && first) state.chosen = [first.id];
    showModels();
    await showInputs();
  }

  function showModels() {
    const wanted = at("filter").value.trim().toLowerCase();
    const fitting = state.models.filter((model) => `${model.id} ${model.task || ""}`.toLowerCase().includes(wanted));
    at("models").replaceChildren(...fitting.slice(0, MOST_SHOWN).map((model) => {
      const box = make("input", { type: "checkbox", value: model.id, checked: state.chosen.includes(model.id) });
      box.addEventListener("change", () => choose(box));
      const task = make("small", {}, model.task || (model.id === backbone() ? "no prefix" : ""));
      return make("li", {}, make("label", { title: model.description }, box, make("span", {}, model.id, " ", task)));
    }));
    const more = fitting.length > MOST_SHOWN ? `, ${MOST_SHOWN} shown` : "";
    at("count").textContent = `${state.chosen.length} chosen of ${fitting.length}${more}`;
  }

  async function choose(box) {
    if (box.checked && state.chosen.length >= MOST_CHOSEN) {
      box.checked = false;
      tell(`At most ${MOST_CHOSEN} models at once.`);
      return;
    }
    state.chosen = box.checked ? [...state.chosen, box.value] : state.chosen.filter((name) => name !== box.value);
    at("count").textContent = `${state.chosen.length} chosen of ${state.models.length}`;
    await showInputs();
  }

  async function taskOf(name) {
    if (!state.tasks.has(name)) {
      const path = `/v1/tasks/${encodeURIComponent(name)}`;
      state.tasks.set(name, await (await api(path)).json().catch(() => ({ fields: [] })));
    }
    return state.tasks.get(name);
  }

  /** The chosen prefix whose fields are asked for: the first that has any. */
  async function leader() {
    for (const name of state.chosen) {
      const task = await taskOf(name).catch(() => ({ fields: [] }));
      if (task.fields.length) return task;
    }
    return null;
  }

  // --- the form ---

  async function showInputs() {
    const kind = mode(), turn = ++state.turn;
    const task = kind === "fields" ? await leader() : null;
    // Something else was chosen meanwhile.
    if (turn !== state.turn) return;
    at("about").textContent = kind === "fields" && !task ? "None of the chosen models has fields of its own: choose another one, or another kind of input." : ABOUT[kind];
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
    const given = new Map([...field.example.matchAll(/([^\[\],]+)\[([^\]]*)\]/g)].map((pair) => [pair[1].trim(), pair[2]]));
    const inputs = field.parts.map((name) => {
      const input = make("input", { value: given.get(name) || "" });
      box.append(make("label", { className: "pair" }, name, input));
      return [name, input];
    });
    return () => inputs.filter(([, input]) => input.value.trim()).map(([name, input]) => `${name}[${input.value.trim()}]`).join(", ");
  }

  function addTriples(box, field) {
    const rows = make("div", { role: "group" });
    rows.setAttribute("aria-label", field.name);
    const add = (parts) => {
      const inputs = ["subject", "property", "object"].map((name, place) => {
        const input = make("input", { value: parts[place] || "", placeholder: name });
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

  // --- writing ---

  async function run() {
    halt();
    if (!state.chosen.length) { tell("Choose a model first."); return; }
    const kind = mode(), asked = state.read(), options = { ...sampling(), stream: true };
    const lead = kind === "fields" || kind === "source" ? await leader() : null;
    const other = lead ? lead.id : state.chosen.find((name) => name !== backbone());
    const cards = state.chosen.map(card);
    at("outputs").replaceChildren(...cards.map((each) => each.element));
    state.running = cards.length;
    at("run").disabled = true;
    at("halt").disabled = false;
    poll();
    tell(`Writing with ${cards.length} ${cards.length === 1 ? "model" : "models"} …`);
    await Promise.all(cards.map((each) => write(each, kind, asked, options, other)));
    state.runs = [];
    state.running = 0;
    at("run").disabled = false;
    at("halt").disabled = true;
    const failed = cards.filter((each) => each.failed).length;
    tell(failed ? `${failed} of ${cards.length} failed.` : "Done.");
  }

  function card(name) {
    const text = make("p", { className: "text" }), facts = make("div", { className: "facts", textContent: "waiting" });
    const element = make("article", { className: `output ${color(name)}` }, make("h3", {}, name), text, facts);
    element.setAttribute("aria-label", `Output of ${name}`);
    element.setAttribute("aria-busy", "true");
    return { name, element, text, facts, failed: false };
  }

  function question(name, kind, asked, options, other) {
    if (kind === "prompt") return ["/v1/completions", { model: name, ...asked, ...options, stream_options: { include_usage: true } }];
    if (kind === "chat") return ["/v1/chat/completions", { model: name, ...asked, ...options, stream_options: { include_usage: true } }];
    // The bare backbone is given the very text that a prefix is given.
    const format = name === backbone() && other ? { format_of: other } : {};
    return [`/v1/tasks/${encodeURIComponent(name)}`, { ...asked, ...options, ...format }];
  }

  async function write(card, kind, asked, options, other) {
    const control = new AbortController();
    state.runs.push(control);
    const begun = performance.now();
    let first = 0, usage = null, reason = "";
    try {
      const [path, body] = question(card.name, kind, asked, options, other);
      const answer = await api(path, { method: "POST", body: JSON.stringify(body), signal: control.signal });
      for await (const news of events(answer)) {
        if (news.error) throw new Error(news.error.message);
        const choice = (news.choices || [])[0] || {};
        const piece = news.delta || choice.text || (choice.delta || {}).content || "";
        if (piece && !first) first = performance.now() - begun;
        if (news.output === undefined) card.text.append(piece);
        else card.text.textContent = news.output;
        usage = news.usage || usage;
        reason = news.finish_reason || choice.finish_reason || reason;
      }
      const seconds = (performance.now() - begun) / 1000, tokens = usage ? usage.completion_tokens : 0;
      card.facts.textContent = `${tokens} tokens · ${(tokens / seconds).toFixed(0)} a second · first after ${first.toFixed(0)} ms · ${reason === "length" ? "cut at its length" : "complete"}`;
    } catch (error) {
      card.failed = error.name !== "AbortError";
      card.facts.textContent = card.failed ? "failed" : "stopped";
      if (card.failed) card.text.append(make("span", { className: "error", textContent: ` ${error.message}` }));
    } finally {
      card.element.setAttribute("aria-busy", "false");
    }
  }

  /** Server-sent events of an answer, as objects. */
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
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
    if (!ended) throw new Error("the connection broke off.");
  }

  function halt() {
    state.runs.forEach((control) => control.abort());
    state.runs = [];
  }

  function tell(text) { at("said").textContent = text; }

  // --- the running batch ---

  let before = null, timer = 0;
  const rates = [];

  function say(text, bad) {
    at("server").textContent = text;
    at("server").className = bad ? "bad" : "";
  }

  async function poll() {
    clearTimeout(timer);
    if (document.visibilityState === "visible") {
      try {
        show(await (await api("/v1/status")).json());
      } catch (error) {
        say(error.status ? error.message : "the server does not answer.", true);
      }
    }
    clearTimeout(timer);
    timer = setTimeout(poll, state.running ? 300 : 1500);
  }

  function show(now) {
    const count = state.models.length - 1;
    say(`${count} ${count === 1 ? "prefix" : "prefixes"} on ${backbone() || "one backbone"}${now.draining ? " · about to stop" : ""}`, now.draining);
    const slots = at("slots");
    while (slots.children.length < Math.min(now.slots, 256)) slots.append(make("li"));
    for (const cell of slots.children) { cell.className = ""; cell.removeAttribute("title"); }
    const groups = new Map();
    for (const text of now.running) {
      const name = text.model === null ? "another's" : text.model;
      groups.set(name, (groups.get(name) || 0) + 1);
      const cell = slots.children[text.slot];
      if (!cell) continue;
      cell.className = `busy ${color(name)}`;
      cell.title = `slot ${text.slot}: ${name}, ${text.new_tokens} tokens`;
    }
    const entries = [...groups].map(([name, texts]) => make("li", {}, make("i", { className: color(name) }), `${name} × ${texts}`));
    at("legend").replaceChildren(...(entries.length ? entries : [make("li", { className: "quiet", textContent: "idle" })]));
    const gone = before ? now.seconds - before.seconds : 0;
    const tokens = before ? Math.max(0, now.tokens - before.tokens) : 0, steps = before ? Math.max(0, now.steps - before.steps) : 0;
    const rate = gone > 0 ? tokens / gone : 0;
    before = now;
    rates.push(rate);
    if (rates.length > 120) rates.shift();
    const asked = now.cache.hits + now.cache.misses;
    figures([
      ["running", `${now.running.length} of ${now.slots}`],
      ["waiting", now.waiting],
      ["tokens a second", rate.toFixed(0)],
      ["tokens a step", steps ? (tokens / steps).toFixed(1) : "–"],
      ["prefixes in memory", now.cache.prefixes],
      ["found there", asked ? `${Math.round(100 * now.cache.hits / asked)} %` : "–"],
    ]);
    const most = Math.max(...rates, 1);
    at("rate").firstElementChild.setAttribute("points", rates.map((value, place) => `${240 - 2 * (rates.length - 1 - place)},${(42 - 40 * value / most).toFixed(1)}`).join(" "));
  }

  function figures(pairs) {
    at("figures").replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  }

  // --- begin ---

  at("key").value = sessionStorage.getItem("key") || "";
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = at("key").value.trim();
    if (key) sessionStorage.setItem("key", key);
    else sessionStorage.removeItem("key");
    state.tasks.clear();
    loadModels();
  });
  at("filter").addEventListener("input", showModels);
  at("modes").addEventListener("change", showInputs);
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  at("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); if (!at("run").disabled) run(); }
    // A line break in the filter is no wish to write.
    else if (event.key === "Enter" && event.target === at("filter")) event.preventDefault();
  });
  at("halt").addEventListener("click", halt);
  loadModels().then(poll);
})();
