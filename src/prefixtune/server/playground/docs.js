"use strict";

// The playground keeps its key there, too; it is gone when the tab is closed.
const storage = sessionStorage;

function withKey(request) {
  const key = storage.getItem("key");
  if (key && new URL(request.url, location.href).origin === location.origin) {
    request.headers.Authorization = `Bearer ${key}`;
  }
  return request;
}

function show() {
  SwaggerUIBundle({ url: "/openapi.json", dom_id: "#interface", requestInterceptor: withKey, validatorUrl: null });
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  storage.setItem("key", document.getElementById("key").value.trim());
  show();
});
show();
