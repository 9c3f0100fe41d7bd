"use strict";
// What both pages need.

const at = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function authorization() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** A failed response as an error with its message, status and code. */
function apiError(status, body) {
  const details = (body && body.error) || {};
  return Object.assign(new Error(details.message || `the server answered with HTTP ${status}.`), { status, code: details.code });
}

async function api(path, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...authorization() };
  const response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  if (!response.ok) throw apiError(response.status, await response.json().catch(() => null));
  return response;
}

const getJson = async (path) => (await api(path)).json();
const postJson = async (path, body) => (await api(path, { method: "POST", body: JSON.stringify(body || {}) })).json();

/** The form for the API key; it is kept until the tab is closed. */
function useKeyForm(changed) {
  at("key").value = sessionStorage.getItem("key") || "";
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = at("key").value.trim();
    if (key) sessionStorage.setItem("key", key);
    else sessionStorage.removeItem("key");
    changed();
  });
}

function showServer(text, bad) {
  at("server").textContent = text;
  at("server").className = bad ? "bad" : "";
}
