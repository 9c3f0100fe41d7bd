"use strict";
// What is asked of a model before and after a training, and the answers: kept in the tab, so that they survive a reload.

/** Functions take a view of a job: { job, name, isServed, isShown }; name is what it is called once it is served. */
const pairs = (() => {
  const MAX_ANSWER = 120, MOST = 20, AGAIN = 10000;
  let turn = 0;

  const keyOf = (id) => `pairs ${id}`;

  function pairsOf(id) {
    try { return JSON.parse(sessionStorage.getItem(keyOf(id))) || null; } catch { return null; }
  }

  function keep(id, list) {
    const kept = list.map(({ messages, before, after }) => ({ messages, before, after }));
    try { sessionStorage.setItem(keyOf(id), JSON.stringify(kept)); } catch { /* no room: asked again after a reload */ }
  }

  /** Remember what is to be asked of a new job; null: it is not known. */
  function begin(id, questions) {
    if (questions) keep(id, questions.map((messages) => ({ messages })));
  }

  /** One more question. */
  function add(id, text) {
    keep(id, [...(pairsOf(id) || []), { messages: [{ role: "user", content: text }] }].slice(-MOST));
  }

  const hasNoResult = ({ status }) => status === "failed" || status === "cancelled";

  function show(view, list = pairsOf(view.job.id) || []) {
    at("pairs").replaceChildren(...list.map((pair) => row(view, pair)));
    at("compare").hidden = hasNoResult(view.job) || (!list.length && !view.isServed());
    at("question").hidden = !view.isServed();
  }

  function row({ job, name, isServed }, pair) {
    const cell = (model, text, className) => make("div", {}, make("dt", {}, model), make("dd", { className: text ? className : `${className} wait` }, text || "…"));
    const asked = pair.messages[pair.messages.length - 1].content;
    const { failed = {} } = pair;
    const after = pair.after || failed.after || (isServed() ? "" : job.status === "succeeded" ? "deleted" : "once it is trained");
    return make("li", {}, make("p", { className: "asked" }, asked), make("dl", { className: "answers" }, cell(job.model, pair.before || failed.before, ""), cell(name, after, pair.after ? "new" : "wait")));
  }

  /** Ask what has not been answered yet: the model as it was, then the new one. One loop at a time. */
  async function fill(view) {
    const mine = ++turn, { job } = view;
    if (hasNoResult(job)) return;
    let list = pairsOf(job.id), isAgain = false;
    if (!list) {
      const questions = await questionsAgain(job);
      if (mine !== turn) return;
      isAgain = questions === null;
      list = (questions || []).map((messages) => ({ messages }));
      if (list.length) keep(job.id, list);
    }
    for (const side of ["before", ...(view.isServed() ? ["after"] : [])]) {
      for (const pair of list) {
        if (pair[side] || mine !== turn || !view.isShown()) continue;
        const { text, lasts } = await answer(side === "before" ? job.model : view.name, pair.messages);
        if (mine !== turn) return;
        // A failure that may pass is shown only, and asked again.
        if (lasts) pair[side] = text;
        else { pair.failed = { ...pair.failed, [side]: text }; isAgain = true; }
        keep(job.id, list);
        show(view, list);
      }
    }
    if (mine !== turn || !view.isShown()) return;
    show(view, list);
    if (isAgain) setTimeout(() => { if (mine === turn && view.isShown()) fill(view); }, AGAIN);
  }

  /** In another tab: from the file, as long as it is there; about a document, the usual ones; null: not to be had now. */
  async function questionsAgain(job) {
    if (job.prefixtune && job.prefixtune.kind === "document") return DOCUMENT_QUESTIONS.map((content) => [{ role: "user", content }]);
    try {
      const preview = await getJson(`/v1/files/${encodeURIComponent(job.training_file)}/preview`);
      return questionsOf(preview.examples || []);
    } catch (error) {
      return isLasting(error) ? [] : null;
    }
  }

  const MAY_PASS = [401, 408, 429];
  /** Whether the same request would fail again: not where the server is away or busy, or the key is wrong. */
  const isLasting = ({ status }) => status >= 400 && status < 500 && !MAY_PASS.includes(status);

  /** A model's answer, or why there is none, and whether that lasts. A model without a chat template continues the text. */
  async function answer(model, messages) {
    const last = messages.slice(-1), options = { model, max_tokens: MAX_ANSWER, temperature: 0 };
    const ways = [
      async () => (await postJson("/v1/chat/completions", { ...options, messages })).choices[0].message.content,
      async () => (await postJson("/v1/chat/completions", { ...options, messages: last })).choices[0].message.content,
      async () => (await postJson("/v1/completions", { ...options, prompt: last[0].content })).choices[0].text,
      async () => (await postJson("/classify", { model, input: last[0].content })).data[0].label,
    ];
    let first = null, lasts = true;
    for (const way of ways) {
      try {
        return { text: String(await way()).trim() || "(an empty text)", lasts: true };
      } catch (error) {
        first = first || error;
        lasts = isLasting(error);
        if (error.status !== 400) break;
      }
    }
    return { text: `(${first.message})`, lasts };
  }

  return { begin, add, show, fill };
})();
