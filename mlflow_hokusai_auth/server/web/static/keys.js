"use strict";
// The page of keys. The server renders the list as HTML. Changes go through the REST API, after which
// the list is fetched again.

/** `…/hokusai/`, below which all pages are. */
const HOME = new URL("..", document.currentScript.src);
const API = new URL("../api/2.0/hokusai", HOME).href;
const DAY = 86400;
const $ = (selector, root = document) => root.querySelector(selector);

/** Call the API and resolve to {status, body}. Never resolves if the session has ended. */
async function call(method, path, body) {
  let answer;
  try {
    answer = await fetch(API + path, {
      method,
      credentials: "same-origin",
      headers: {
        "X-CSRF-Token": $('meta[name="csrf-token"]').content,
        ...(body && { "Content-Type": "application/json" }),
      },
      body: body && JSON.stringify(body),
    });
  } catch {
    return { status: 0, body: { message: "The server can’t be reached. Try again." } };
  }
  if (answer.status === 401) return signIn();
  const text = await answer.text();
  try {
    return { status: answer.status, body: JSON.parse(text) };
  } catch {
    return { status: answer.status, body: { message: `The server answered ${answer.status}.` } };
  }
}

function signIn() {
  const here = "/hokusai/" + location.href.slice(HOME.href.length).replace(/#.*/, "");
  location.assign(new URL("login?next=" + encodeURIComponent(here), HOME));
  return new Promise(() => {});
}

/**
 * Fetch the list again and replace the one shown. The focus stays on the button that opened the dialog
 * or, if the button is gone, on the row, or on the row that took its place.
 */
async function refresh() {
  let answer;
  try {
    answer = await fetch(location.href, { credentials: "same-origin" });
  } catch {
    return;
  }
  if (answer.status === 401) await signIn();
  if (!answer.ok) return;
  const row = opener?.closest("[data-key]");
  const place = [...document.querySelectorAll("tr[data-key]")].indexOf(row);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  $("#list").replaceWith($("#list", page));
  localise();
  if (opener?.isConnected) return;
  const rows = [...document.querySelectorAll("tr[data-key]")];
  const now = (row?.id && document.getElementById(row.id)) || rows[Math.min(place, rows.length - 1)];
  focus((now && $(`[data-open="${opener.dataset.open}"]`, now)) ?? now ?? $("#list"));
}

function focus(element) {
  if (element.tabIndex < 0) element.tabIndex = -1;
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest" });
}

// Times

const ZONED = new Intl.DateTimeFormat(undefined, {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", timeZoneName: "short",
});
const DATE = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
const NEAR = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const UNITS = [["day", DAY], ["hour", 3600], ["minute", 60]];

function localise() {
  for (const time of document.querySelectorAll("time")) {
    const at = new Date(time.dateTime);
    const seconds = (at - Date.now()) / 1000;
    const [unit, length] = UNITS.find(([, n]) => Math.abs(seconds) >= n) ?? UNITS.at(-1);
    const near = time.dataset.style === "near" && Math.abs(seconds) < 45 * DAY;
    time.textContent = near ? NEAR.format(Math.round(seconds / length), unit) : DATE.format(at);
    time.title = ZONED.format(at);
    if (time.dataset.style === "exact") time.textContent = time.title;
  }
  for (const code of document.querySelectorAll("code.id")) code.replaceWith(idButton(code));
  for (const button of document.querySelectorAll("[data-copy][hidden]")) button.hidden = false;
  countSelected();
}

/** A button that copies the public id in `code`. */
function idButton(code) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "id";
  button.dataset.id = button.textContent = code.textContent;
  button.title = `Copy this id.${code.title && ` ${code.title}.`}`;
  return button;
}

// Several keys

const boxes = () => [...document.querySelectorAll('[name="key_id"][type="checkbox"]:not(:disabled)')];

function countSelected() {
  const place = $("[data-selected]");
  if (!place) return;
  const number = boxes().filter(({ checked }) => checked).length;
  const all = $("[data-all]");
  all.closest("label").hidden = !boxes().length;
  all.checked = number > 0 && number === boxes().length;
  all.indeterminate = number > 0 && number < boxes().length;
  place.textContent = `${number} selected`;
  for (const button of place.parentElement.querySelectorAll("button")) button.disabled = !number;
}

async function copyId(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.id);
  } catch {
    getSelection().selectAllChildren(button); // The clipboard needs https and permission.
    if (!document.execCommand("copy")) return;
    getSelection().removeAllRanges();
  }
  button.classList.add("copied");
  $("main > .status").textContent = `${button.dataset.id} copied.`;
  setTimeout(() => button.classList.remove("copied"), 1500);
}

// Dialogs

/** The key of the open dialog, as the API described it, and the button that opened the dialog. */
let subject = null;
let opener = null;

function open(name, key = null) {
  const dialog = document.getElementById(name);
  const form = $("form", dialog);
  subject = key;
  form.reset();
  if (dialog.dataset.once === undefined) $("main > .status").textContent = "";
  complain(form, "");
  for (const box of dialog.querySelectorAll(".extra")) box.remove();
  if (key) {
    const until = key.expires_at && ZONED.format(key.expires_at * 1000);
    const texts = { ...key, called: key.name || key.owner, until };
    for (const item of dialog.querySelectorAll("[data-show]")) item.textContent = texts[item.dataset.show];
    for (const item of dialog.querySelectorAll("[data-if]")) item.hidden = key.key_id !== $("main").dataset.me;
  }
  if (name === "edit") fill(form, key);
  if (name === "revoke") force(form, false);
  if (form.expiry) showDays(form);
  dialog.showModal();
  dialog.scrollTop = 0;
}

function fill(form, key) {
  for (const name of ["owner", "name", "note", "rate_limit_per_hour"]) form[name].value = key[name] ?? "";
  for (const name of ["networks", "models"]) form[name].value = key[name].join("\n");
  form.no_delete.checked = key.no_delete;
  for (const scope of key.scopes) {
    let box = [...form.scopes].find(({ value }) => value === scope);
    if (!box) {
      // Keep a scope that the form does not offer, such as an older name.
      const label = $(".boxes .check", form).cloneNode(true);
      label.classList.add("extra");
      $("code", label).textContent = scope;
      $(".quiet", label).textContent = "";
      $(".boxes", form).append(label);
      box = $("input", label);
      box.value = scope;
    }
    box.checked = true;
  }
}

function showDays(form) {
  const shown = form.expiry.value === "custom";
  form.days.hidden = form.days.disabled = !shown;
}

function force(form, shown) {
  $(".force", form).hidden = form.force.disabled = !shown;
}

function fields(form) {
  const data = new FormData(form);
  const expiry = data.get("expiry") === "custom" ? data.get("days") : data.get("expiry");
  return {
    owner: data.get("owner").trim(),
    name: data.get("name").trim(),
    note: data.get("note").trim(),
    scopes: data.getAll("scopes"),
    networks: data.get("networks").split(/[\s,]+/).filter(Boolean),
    rate_limit_per_hour: Number(data.get("rate_limit_per_hour")) || null,
    models: data.get("models").split("\n").map((line) => line.trim()).filter(Boolean),
    no_delete: data.has("no_delete"),
    ...(expiry !== "keep" && { expires_in: expiry === "never" ? null : expiry * DAY }),
  };
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** True if the new key is handed over by a link. A supplier has no choice. */
const linked = (form) => form.give?.value === "link";
const BY_LINK = "gets the new key by the link";
const NOT_BY_LINK = "A link makes a new key. Leave this empty, or choose “Show me the key”.";

/** The action of each dialog: resolves to the API's answer and the words for its success. */
const submit = {
  async create(form) {
    const key = form.key.value.trim();
    const body = fields(form);
    const made = { ...body, environment: form.environment.value };
    if (key && linked(form)) return [{ status: 400, body: { fields: { key: NOT_BY_LINK } } }, ""];
    if (key) return [await call("POST", "/keys/import", { ...body, key }), "imported"];
    if (linked(form)) return [await call("POST", "/links", { key: made }), BY_LINK];
    return [await call("POST", "/keys", made), "created"];
  },
  async rotate(form) {
    const body = { overlap: Number(form.overlap.value) };
    if (linked(form)) return [await call("POST", "/links", { replaces: subject.key_id, ...body }), BY_LINK];
    return [await call("POST", `/keys/${subject.key_id}/rotate`, body), "rotated"];
  },
  async edit(form) {
    const now = fields(form);
    now.scopes.sort();
    const changed = Object.entries(now).filter(([name, value]) => !same(value, subject[name]));
    if (!changed.length) return [{ status: 200, body: {} }, ""];
    return [await call("PATCH", `/keys/${subject.key_id}`, Object.fromEntries(changed)), "saved"];
  },
  async revoke(form) {
    const query = `?wait=true&force=${!form.force.disabled && form.force.checked}`;
    const answer = await call("DELETE", `/keys/${subject.key_id}${query}`);
    if (answer.status === 409) force(form, true);
    return [answer, "revoked and refused everywhere"];
  },
};

async function send(dialog, form) {
  if (form.scopes && !new FormData(form).has("scopes")) {
    complain(form, "", { scopes: "Choose at least one scope." });
    return;
  }
  const button = $(".buttons button:last-child", form);
  dialog.dataset.busy = "";
  button.setAttribute("aria-disabled", "true");
  complain(form, "");
  const [{ status, body }, outcome] = await submit[dialog.id](form);
  delete dialog.dataset.busy;
  button.removeAttribute("aria-disabled");
  if (status < 200 || status >= 300) {
    complain(form, body.message ?? `The server answered ${status}.`, body.fields);
    return;
  }
  const about = subject ?? body;
  dialog.close();
  $("main > .status").textContent = outcome && `${about.name || about.owner} ${outcome}.`;
  if (body.key || body.url) show({ ...body, name: about.name });
  else await refresh();
}

/** Say what is wrong: beside each field of `fields`, and about all others beside the buttons. */
function complain(form, message, fields = {}) {
  for (const place of form.querySelectorAll(".field-problem")) place.remove();
  for (const control of form.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    describe(control, (ids) => ids.filter((id) => !id.endsWith("-problem")));
  }
  const wrong = Object.keys(fields).map((name) => [controls(form, name.replace(/^key\./, "")), fields[name]]);
  const known = wrong.length > 0 && wrong.every(([found]) => found.length);
  const place = $(".buttons .problem", form);
  if (place) place.textContent = known ? "" : message;
  for (const [found, text] of wrong) if (found.length) mark(found, text);
  const first = $("[aria-invalid]", form) ?? (message && form.force && !form.force.disabled && form.force);
  if (!first) return;
  const folded = first.closest("details");
  if (folded) folded.open = true;
  first.focus({ preventScroll: true });
  (first.closest("fieldset, .field") ?? first).scrollIntoView({ block: "nearest" });
}

/** The controls of the field that the API calls `name`. */
function controls(form, name) {
  if (name === "expires_in") name = form.days?.disabled === false ? "days" : "expiry";
  return [...form.elements].filter((control) => control.name === name);
}

function mark(found, text) {
  const place = document.createElement("p");
  place.className = "problem field-problem";
  place.id = `${found[0].form.parentElement.id}-${found[0].name}-problem`;
  place.textContent = text;
  const box = found[0].closest("fieldset, .field");
  if (found.length > 1) $("legend", box).after(place);
  else (found[0].closest("label.check") ?? found[0]).after(place);
  for (const control of found) {
    control.setAttribute("aria-invalid", "true");
    describe(control, (ids) => [place.id, ...ids]);
  }
}

function describe(control, change) {
  const ids = change((control.getAttribute("aria-describedby") ?? "").split(" ").filter(Boolean));
  if (ids.length) control.setAttribute("aria-describedby", ids.join(" "));
  else control.removeAttribute("aria-describedby");
}

// The dialogs that show a new key, or a link to one, once

let copied = true;
let warned = false;

function show(made) {
  open(made.url ? "linked" : "made", made);
  if (made.url) $("#linked-url").value = made.url;
  else {
    const server = new URL("..", HOME).href.replace(/\/$/, "");
    $("#made-key").value = made.key;
    $("#made-lines").value = `export HOKUSAI_API_KEY=${made.key}\nexport MLFLOW_TRACKING_URI=${server}`;
  }
  $("dialog[open] .copy textarea").select();
  copied = warned = false;
}

/** Return whether the dialog must stay open: the first time, for what nobody has copied. */
function hold() {
  if (copied || warned) return false;
  warned = true;
  tell("Not copied yet. Press Done or Escape again to close anyway.", true);
  return true;
}

function tell(text, warns = false, place = $("dialog[open] .status")) {
  place.textContent = text;
  place.classList.toggle("warns", warns);
}

async function copy(button) {
  const field = document.getElementById(button.dataset.copy);
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    copied = true;
  } catch {
    copied = document.execCommand("copy"); // The clipboard needs https and permission.
  }
  const place = $(".status", button.closest("dialog, main"));
  tell(copied ? "Copied." : "Copying is not allowed here. Press Ctrl+C.", !copied, place);
  if (copied) button.focus();
}

function forget() {
  for (const field of document.querySelectorAll("[data-once] :is(input, textarea)")) field.value = "";
  for (const place of document.querySelectorAll("[data-once] .status")) tell("", false, place);
  return refresh();
}

// Events

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { open: name, copy: source, close, id } = button.dataset;
  if (id) copyId(button);
  else if (name) {
    event.preventDefault(); // Without a script the button leads to a form.
    const row = button.closest("[data-key]");
    opener = button;
    open(name, row && JSON.parse(row.dataset.key));
  } else if (source) copy(button);
  else if (close !== undefined) button.closest("dialog").close();
});

document.addEventListener("change", ({ target }) => {
  if (target.dataset.all !== undefined) for (const box of boxes()) box.checked = target.checked;
  if (target.dataset.all !== undefined || target.name === "key_id") countSelected();
  if (target.name === "expiry") {
    showDays(target.form);
    if (!target.form.days.hidden) target.form.days.focus();
  }
});

for (const dialog of document.querySelectorAll("dialog")) {
  const once = dialog.dataset.once !== undefined;
  dialog.addEventListener("submit", (event) => {
    if (once) {
      if (hold()) event.preventDefault();
      return;
    }
    event.preventDefault();
    if (dialog.dataset.busy === undefined) send(dialog, event.target);
  });
  dialog.addEventListener("cancel", (event) => {
    if (dialog.dataset.busy !== undefined) event.preventDefault();
    if (once && hold()) event.preventDefault();
  });
  if (once) {
    dialog.addEventListener("close", forget);
    dialog.addEventListener("copy", ({ target }) => {
      if (!target.matches("input, textarea")) return;
      copied = true;
      tell("Copied.");
    });
  }
}

// Somebody may have set a public URL that leads elsewhere, or nowhere.
for (const warning of document.querySelectorAll("[data-origins]")) {
  warning.hidden = warning.dataset.origins.split(" ").includes(location.origin);
}

localise();
