/* The Playground's own script: rows that glide to their new place, the history under the light of one row, copying,
   and words when the server is silent. Everything else is htmx and HTML. */
"use strict";

const stage = () => document.getElementById("stage");
const still = matchMedia("(prefers-reduced-motion: reduce)");
const notice = document.getElementById("notice");
const lists = { row: "#stage .row[data-key]", past: "#stage .history > li[data-key]" };
let places = new Map();
let clicked = null; // place in the list of the item last clicked, to give the focus back near it

function positions() {
  const found = new Map();
  for (const [kind, selector] of Object.entries(lists))
    for (const node of document.querySelectorAll(selector)) found.set(kind + node.dataset.key, node.getBoundingClientRect().top);
  return found;
}

function glide() {
  if (still.matches || !places.size) return;
  for (const [kind, selector] of Object.entries(lists))
    for (const node of document.querySelectorAll(selector)) {
      const before = places.get(kind + node.dataset.key);
      const now = node.getBoundingClientRect().top;
      if (before === undefined)
        node.animate([{ opacity: 0, transform: "translateX(12px)" }, { opacity: 1, transform: "none" }], { duration: 320, easing: "ease-out" });
      else if (Math.abs(before - now) > 1)
        node.animate([{ transform: `translateY(${before - now}px)` }, { transform: "none" }], { duration: 420, easing: "cubic-bezier(.2,.8,.2,1)" });
    }
}

function say(text) {
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = !text;
}

/* Which part of the history weighs in one row: that row's weights in place of the list's mean. */
function light(row) {
  const lens = document.getElementById("lens");
  if (!lens) return;
  const weights = row ? JSON.parse(row.dataset.weights || "[]") : null;
  document.querySelectorAll("#stage .history > li").forEach((node, place) => {
    const share = weights ? weights[place] || 0 : Number(node.dataset.bar);
    node.querySelector(".fill").setAttribute("width", `${(100 * share).toFixed(2)}%`);
  });
  document.querySelectorAll("#stage .row.lit").forEach((node) => node.classList.toggle("lit", node === row));
  if (row) row.classList.add("lit");
  lens.textContent = row ? `Bars: weight for ${row.querySelector(".title").textContent}` : lens.dataset.default;
}

function rowOf(event) {
  return event.target instanceof Element ? event.target.closest(lists.row) : null;
}

/* The list of users follows the stage: who is shown, and how long the history is now. */
function follow() {
  const shown = stage().querySelector("[data-shown-user]");
  if (!shown) return;
  const user = shown.dataset.shownUser;
  document.title = `${user} · Playground · plexrank`;
  for (const link of document.querySelectorAll("#users a")) {
    if (link.dataset.user === user) {
      link.setAttribute("aria-current", "true");
      link.querySelector(".count").firstChild.textContent = shown.dataset.historyLength;
      reveal(link);
    } else link.removeAttribute("aria-current");
  }
}

/* Scrolls the list, never the page. */
function reveal(link) {
  const list = document.getElementById("users");
  const [top, left] = [link.offsetTop, link.offsetLeft];
  if (top < list.scrollTop || top + link.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
  if (left < list.scrollLeft || left + link.offsetWidth > list.scrollLeft + list.clientWidth) list.scrollLeft = left - list.clientWidth / 3;
}

document.addEventListener("pointerover", (event) => light(rowOf(event)));
document.addEventListener("focusin", (event) => rowOf(event) && light(rowOf(event)));
document.addEventListener("focusout", (event) => rowOf(event) && light(null));

document.addEventListener("click", async (event) => {
  const button = event.target instanceof Element ? event.target.closest("[data-copy]") : null;
  if (!button) return;
  const label = button.textContent;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source);
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (button.textContent = label), 1600);
});

document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.elt.id === "learnt") return; // asks every second, and takes no words away
  say("");
  if (event.detail.target !== stage()) return;
  stage().setAttribute("aria-busy", "true");
  const row = document.activeElement && document.activeElement.closest(lists.row);
  clicked = row ? [...document.querySelectorAll(lists.row)].indexOf(row) : null;
});
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.target === stage()) stage().removeAttribute("aria-busy");
});
document.addEventListener("htmx:beforeSwap", (event) => {
  if (event.detail.target === stage()) places = positions();
});
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id === "users") follow();
  if (event.detail.target !== stage()) return;
  glide();
  follow();
  if (clicked !== null && (document.activeElement === document.body || document.activeElement === null)) {
    const titles = document.querySelectorAll("#stage .row .title");
    const next = titles[Math.min(clicked, titles.length - 1)];
    if (next) next.focus({ preventScroll: true, focusVisible: false });
  }
  light(null);
});
document.addEventListener("htmx:sendError", () => say("The server does not answer. The list is as it was; try again."));
document.addEventListener("htmx:timeout", () => say("The server took too long to answer. Try again."));
follow();
