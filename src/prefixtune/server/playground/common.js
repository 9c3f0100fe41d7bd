"use strict";
// What the pages share.

const at = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Show a text; a screen reader says it only if it has changed. */
function say(id, text, className = "") {
  if (at(id).textContent !== text) at(id).textContent = text;
  at(id).className = className;
}

function authorization() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** A successful response. Every other one is an error with a message for people, and a status if there was an answer. */
async function api(path, options = {}) {
  const headers = { ...(typeof options.body === "string" ? { "Content-Type": "application/json" } : {}), ...authorization() };
  const response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not respond.");
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw Object.assign(new Error((body && body.error && body.error.message) || `The server answered with HTTP ${response.status}.`), { status: response.status });
}

const getJson = async (path) => (await api(path)).json();
const postJson = async (path, body = {}) => (await api(path, { method: "POST", body: JSON.stringify(body) })).json();

/** The form for the API key. The key is kept until the tab is closed. */
function useKeyForm() {
  at("key").value = sessionStorage.getItem("key") || "";
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("key", at("key").value.trim());
    location.reload();
  });
}

/**
 * Look at the server again and again while the page is visible, and less often while the server is away.
 * @param look gives the milliseconds until the next look
 * @returns a function that looks now
 */
function keepLooking(look) {
  let timer = 0, turn = 0, failures = 0;
  async function now() {
    if (document.visibilityState !== "visible") return;
    clearTimeout(timer);
    const mine = ++turn;
    let wait = 0;
    try {
      wait = await look();
      failures = 0;
    } catch (error) {
      say("server", error.message, "error");
      // With a wrong key nothing changes until another one is entered.
      if (error.status !== 401 && error.status !== 403) wait = Math.min(30000, 1000 * 2 ** failures++);
    }
    if (mine === turn && wait) timer = setTimeout(now, wait);
  }
  document.addEventListener("visibilitychange", now);
  return now;
}

/** Ctrl and Enter in a form submit it. */
function submitByKey(form) {
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

/** Show named figures in a description list. */
function showFigures(id, pairs) {
  at(id).replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}
