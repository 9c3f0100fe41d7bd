"use strict";

// The playground keeps its key there, too; it is gone when the tab is closed.
const storage = sessionStorage;
const form = document.getElementById("key-form");
const dark = matchMedia("(prefers-color-scheme: dark)");

function withKey(request) {
  const key = storage.getItem("key");
  if (key && new URL(request.url, location.href).origin === location.origin) {
    request.headers.Authorization = `Bearer ${key}`;
  }
  return request;
}

// A server without keys has no form to enter one.
function showForm(response) {
  if (response.status === 401 || response.obj?.components?.securitySchemes) form.hidden = false;
  return response;
}

function show() {
  SwaggerUIBundle({
    url: "/openapi.json",
    dom_id: "#interface",
    requestInterceptor: withKey,
    responseInterceptor: showForm,
    validatorUrl: null,
  });
}

function setScheme() {
  document.documentElement.classList.toggle("dark-mode", dark.matches);
}

dark.addEventListener("change", setScheme);
setScheme();
form.addEventListener("submit", (event) => {
  event.preventDefault();
  storage.setItem("key", document.getElementById("key").value.trim());
  show();
});
show();
