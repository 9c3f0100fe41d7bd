"use strict";
// Jobs: the list of them, and one of them as it goes on.

const jobs = (() => {
  const ENDED = ["succeeded", "failed", "cancelled"];
  const PAGE = 20, MAX_EVENT_PAGES = 20, SHOWN_EVENTS = 100, LATE_SECONDS = 60;
  const FASTEST = 1500, IDLE = 20000, SLOWEST = 30000;
  const state = {
    backbone: "", models: [], list: [], more: false, pages: 1, last: "", id: "", curves: new Map(), status: "",
    failures: 0, timer: 0, turn: 0, polls: 0, tell: () => {},
  };

  const pathOf = (id, more = "") => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}${more}`;
  const progressOf = (job) => (job.prefixtune && job.prefixtune.progress) || {};
  const nameOf = (job) => job.fine_tuned_model || (job.prefixtune && job.prefixtune.name) || job.id;
  /** Whether its result answers: it may have been deleted, and another job's may have its name by now. */
  const answers = (job) => job.status === "succeeded" && state.models.some((model) => model.id === nameOf(job) && (!model.job || model.job === job.id));
  const current = () => state.list.find((job) => job.id === state.id) || null;

  // --- polling ---

  /** Look now, and then again and again: seldom where nothing happens, more and more seldom where the server is away. */
  async function poll() {
    clearTimeout(state.timer);
    const turn = ++state.turn;
    let wait = IDLE;
    if (document.visibilityState === "visible") {
      try {
        await look();
        if (state.failures) state.tell({ isBack: true });
        state.failures = 0;
        wait = state.list.some((job) => job.status === "running") ? FASTEST : state.list.some((job) => job.status === "queued") ? 2 * FASTEST : IDLE;
      } catch (error) {
        wait = Math.min(SLOWEST, FASTEST * 2 ** state.failures++);
        const again = error.status === 401 || error.status === 403 ? "" : ` Tried again in ${Math.round(wait / 1000)} seconds.`;
        showServer(error.status ? error.message : "the server does not respond.", true);
        at("list-said").textContent = `${error.status ? error.message : "The server does not respond."}${again}`;
        if (!again) wait = 0;
      }
    }
    if (turn !== state.turn) return;
    clearTimeout(state.timer);
    if (wait) state.timer = setTimeout(poll, wait);
  }

  async function look() {
    // The list seldom; the job that is shown each time.
    if (state.polls++ % 6 === 0 || !state.list.length || state.failures) await loadList();
    else if (state.id && current() && !ENDED.includes(current().status)) replace(await getJson(pathOf(state.id)));
    if (state.id && !current()) await loadNamed();
    showList();
    if (current()) await showJob(current());
  }

  async function loadModels() {
    state.models = (await getJson("/v1/models")).data;
    state.tell({ isBack: false });
  }

  async function loadList() {
    if (!state.models.length) await loadModels();
    const page = await getJson(`/v1/fine_tuning/jobs?limit=${PAGE}`);
    const older = state.list.filter((job) => !page.data.some(({ id }) => id === job.id) && page.has_more && job.created_at <= page.data[page.data.length - 1].created_at);
    if (!page.has_more) state.pages = 1;
    if (state.pages === 1) Object.assign(state, { more: page.has_more, last: lastOf(page) });
    // What is on no page that is looked at, and goes on.
    const unfinished = older.filter((job) => !ENDED.includes(job.status)).slice(0, PAGE);
    const now = await Promise.all(unfinished.map((job) => getJson(pathOf(job.id)).catch(() => job)));
    state.list = [...page.data, ...older.map((job) => now.find(({ id }) => id === job.id) || job)];
    // Not every key sees it among the models.
    state.backbone = (page.prefixtune && page.prefixtune.backbone) || "";
    showServer(`training on ${state.backbone || "one backbone"}`, false);
    if (!state.id) openFirst();
  }

  /** The job that is shown, where the list does not have it. If it is gone, or another key's: the first of the list. */
  async function loadNamed() {
    try {
      state.list.unshift(await getJson(pathOf(state.id)));
    } catch (error) {
      if (error.status !== 404) throw error;
      Object.assign(state, { id: "", status: "" });
      at("job").hidden = true;
      history.replaceState(null, "", location.pathname);
      openFirst();
    }
  }

  function openFirst() {
    const first = state.list.find((job) => !ENDED.includes(job.status)) || state.list[0];
    if (first) open(first.id, false);
  }

  const lastOf = ({ data }) => (data.length ? data[data.length - 1].id : "");

  async function loadMore() {
    try {
      const page = await getJson(`/v1/fine_tuning/jobs?limit=${PAGE}&after=${encodeURIComponent(state.last)}`);
      state.list = [...state.list, ...page.data.filter(({ id }) => !state.list.some((job) => job.id === id))].sort((one, other) => other.created_at - one.created_at);
      Object.assign(state, { more: page.has_more, pages: state.pages + 1, last: lastOf(page) || state.last });
      showList();
    } catch (error) {
      at("list-said").textContent = error.message;
    }
  }

  function replace(job) {
    state.list = state.list.map((one) => (one.id === job.id ? job : one));
  }

  // --- the list ---

  function showList() {
    const box = at("jobs"), focused = box.contains(document.activeElement) && document.activeElement.value;
    box.replaceChildren(...state.list.map((job) => {
      const row = make("button", { type: "button", value: job.id }, make("b", {}, nameOf(job)), make("span", { className: job.status }, say(job)), make("small", {}, when(job.created_at)));
      if (job.id === state.id) row.setAttribute("aria-current", "true");
      row.addEventListener("click", () => { open(job.id, true); poll(); });
      return make("li", {}, row);
    }));
    if (focused) [...box.querySelectorAll("button")].filter((row) => row.value === focused).forEach((row) => row.focus());
    at("more-jobs").hidden = !state.more;
    at("list-said").textContent = state.list.length ? "" : "No jobs yet.";
  }

  const when = (seconds) => new Date(1000 * seconds).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

  function say(job) {
    const { step, total_steps: total } = progressOf(job), ahead = job.prefixtune && job.prefixtune.position;
    if (job.status === "running" && total) return `running, ${Math.floor((100 * step) / total)} %`;
    if (job.status === "queued" && Number.isFinite(ahead)) return ahead ? `waiting, ${ahead} before it` : "waiting, next in line";
    return job.status === "queued" ? "waiting" : job.status;
  }

  function open(id, focus) {
    if (state.id !== id) state.status = "";
    state.id = id;
    history.replaceState(null, "", `#${id}`);
    if (focus) {
      // Of the first job it is still hidden, and would not get the focus.
      at("job").hidden = false;
      at("job").focus({ preventScroll: false });
    }
  }

  // --- one job ---

  async function showJob(job) {
    const { step = 0, total_steps: total = 0 } = progressOf(job), ended = ENDED.includes(job.status);
    at("job").hidden = false;
    at("job-title").textContent = nameOf(job);
    at("bar").hidden = ended;
    if (total) at("bar").value = step / total;
    else at("bar").removeAttribute("value");
    if (job.status !== "running" && !total) at("bar").value = 0;
    at("bar-text").textContent = ended ? "" : sayProgress(job);
    at("job-error").textContent = job.error && job.error.message ? job.error.message : "";
    if (state.status !== `${job.id} ${job.status}`) {
      if (job.status === "succeeded") await loadModels();
      if (job.id !== state.id) return;
      state.status = `${job.id} ${job.status}`;
      at("job-said").textContent = sayStatus(job);
      at("job-said").className = job.status;
      showActions(job);
      pairs.show(viewOf(job));
      pairs.fill(viewOf(job));
    }
    await showEvents(job);
  }

  function sayStatus(job) {
    const seconds = job.finished_at ? job.finished_at - job.created_at : 0;
    const texts = {
      queued: "It waits for its turn.", running: "It trains.", paused: "Paused: nothing is lost.", cancelled: "Cancelled.",
      failed: "It failed.", succeeded: `Done, ${duration(seconds)} after it was asked for. ${nameOf(job)} answers now.`,
    };
    return texts[job.status] || `${job.status}.`;
  }

  function sayProgress(job) {
    const { step, total_steps: total, seconds_left: left } = progressOf(job), isKnown = job.estimated_finish && Number.isFinite(left);
    if (job.status === "queued") return `${say(job)[0].toUpperCase()}${say(job).slice(1)}.`;
    if (!total) return job.status === "running" ? "It is being prepared; the time left is known after its first step." : "";
    return `Step ${count(step)} of ${count(total)}${job.status === "running" ? `, ${isKnown ? `${duration(left)} left` : "the time left is known after the next step"}` : ""}`;
  }

  function duration(seconds) {
    if (seconds <= 1) return "a second";
    if (seconds < 90) return `${Math.ceil(seconds)} seconds`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} minutes` : `${(seconds / 3600).toFixed(1)} hours`;
  }

  // --- events ---

  async function showEvents(job) {
    if (!state.curves.has(job.id)) state.curves.set(job.id, { train: [], valid: [], events: [], ids: new Set() });
    const curve = state.curves.get(job.id);
    if (!curve.whole) {
      for (const event of (await newEvents(job.id, curve)).reverse()) keep(curve, event);
      // A worker notices a while later that a job was cancelled, and says where.
      curve.whole = ENDED.includes(job.status) && (job.status !== "cancelled" || Date.now() / 1000 - job.finished_at > LATE_SECONDS);
    }
    if (job.id !== state.id) return;
    drawCurve(at("curve"), curve, progressOf(job).total_steps || 0);
    at("events").replaceChildren(...curve.events.slice(-SHOWN_EVENTS).reverse().map((event) =>
      make("li", { className: event.level === "error" ? "error" : "" }, make("time", {}, new Date(1000 * event.created_at).toLocaleTimeString()), event.message)));
  }

  /** Events that are not known yet, the newest first. */
  async function newEvents(id, curve) {
    const found = [];
    let after = "";
    for (let page = 0; page < MAX_EVENT_PAGES; page++) {
      const { data, has_more: more } = await getJson(pathOf(id, `/events?limit=100${after}`));
      const fresh = data.filter((event) => !curve.ids.has(event.id));
      found.push(...fresh);
      if (!more || fresh.length < data.length) break;
      after = `&after=${encodeURIComponent(data[data.length - 1].id)}`;
    }
    return found;
  }

  function keep(curve, event) {
    // Two looks at once may both bring it.
    if (curve.ids.has(event.id)) return;
    curve.ids.add(event.id);
    const data = event.data || {};
    if (event.type !== "metrics") curve.events.push(event);
    else if (Number.isFinite(data.train_loss)) curve.train.push([data.step, data.train_loss]);
    if (Number.isFinite(data.valid_loss)) curve.valid.push([data.step, data.valid_loss]);
    if (curve.events.length > 4 * SHOWN_EVENTS) curve.events.splice(0, SHOWN_EVENTS);
  }

  // --- what can be done ---

  function showActions(job) {
    const name = nameOf(job), box = at("actions"), had = box.contains(document.activeElement);
    const button = (text, action) => {
      const element = make("button", { type: "button", textContent: text });
      element.addEventListener("click", () => attempt(element, action));
      return element;
    };
    const cancel = button("Cancel", async () => {
      if (await sure(`Cancel ${name}? What it has learned so far is lost.`, "Cancel it", "Go on")) await change(job, "cancel");
    });
    const buttons = {
      queued: [button("Pause", () => change(job, "pause")), cancel],
      running: [button("Pause", () => change(job, "pause")), cancel],
      paused: [button("Resume", () => change(job, "resume")), cancel],
      succeeded: [
        ...(at("pages") ? [make("a", { className: "button", textContent: "Open in the playground", href: `/#mode=chat&models=${encodeURIComponent(`${name},${state.backbone}`)}` })] : []),
        button("Download", () => download(name)),
        button("Delete", async () => {
          if (await sure(`Delete ${name}? It cannot be brought back.`, "Delete it", "Keep it")) await remove(job, name);
        }),
      ],
    };
    const gone = job.status === "succeeded" && !answers(job);
    const said = make("p", { id: "action-said", role: "status" }, gone ? `${name} was deleted.` : "");
    box.replaceChildren(...(gone ? [] : buttons[job.status] || []), said);
    if (had && box.firstElementChild) box.firstElementChild.focus();
  }

  async function attempt(button, action) {
    button.disabled = true;
    at("action-said").textContent = "";
    at("action-said").className = "";
    try {
      await action();
    } catch (error) {
      at("action-said").textContent = error.message;
      at("action-said").className = "error";
    } finally {
      button.disabled = false;
    }
  }

  /** Ask before something that cannot be undone. */
  function sure(text, yes, no) {
    const dialog = at("sure");
    at("sure-text").textContent = text;
    at("sure-yes").textContent = yes;
    at("sure-no").textContent = no;
    return new Promise((resolve) => {
      const close = (answer) => () => { dialog.returnValue = answer; dialog.close(); };
      at("sure-yes").onclick = close("yes");
      at("sure-no").onclick = close("");
      dialog.returnValue = "";
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
      dialog.showModal();
      at("sure-no").focus();
    });
  }

  async function change(job, action) {
    replace(await postJson(pathOf(job.id, `/${action}`)));
    await poll();
  }

  async function download(name) {
    const response = await api(`/v1/models/${encodeURIComponent(name)}/file`);
    const url = URL.createObjectURL(await response.blob());
    make("a", { href: url, download: `${name}.safetensors` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    at("action-said").textContent = `${name}.safetensors was downloaded.`;
  }

  async function remove(job, name) {
    await api(`/v1/models/${encodeURIComponent(name)}`, { method: "DELETE" });
    await loadModels();
    showActions(job);
    pairs.show(viewOf(job));
    at("job").focus();
  }

  // --- before and after ---

  /** A job as `pairs` needs it. */
  const viewOf = (job) => ({ job, name: nameOf(job), isServed: () => answers(job), isShown: () => job.id === state.id });

  /** Show a new job, and remember what is to be asked before and after. */
  function begin(job, questions) {
    pairs.begin(job.id, questions);
    state.list.unshift(job);
    open(job.id, true);
    poll();
  }

  async function ask() {
    const job = current(), text = at("own").value.trim();
    if (!job || !text) return;
    at("own").value = "";
    pairs.add(job.id, text);
    pairs.show(viewOf(job));
    await pairs.fill(viewOf(job));
  }

  // --- start ---

  /** The job that the page's address names. */
  const named = () => (/^#(ftjob-[0-9a-f]+)$/.exec(location.hash) || ["", ""])[1];

  function start() {
    state.id = named();
    at("more-jobs").addEventListener("click", loadMore);
    at("question").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
    at("own").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
    });
    document.addEventListener("visibilitychange", () => { if (document.visibilityState === "visible") poll(); });
    return poll();
  }

  /** After another key: forget what was seen with the one before. */
  function restart() {
    Object.assign(state, { list: [], models: [], id: named(), status: "", polls: 0, more: false, pages: 1 });
    state.curves.clear();
    at("job").hidden = true;
    return poll();
  }

  /** Call this when other models are there, or when the server is back. */
  const onNews = (tell) => { state.tell = tell; };

  return { start, restart, begin, duration, onNews, state };
})();
