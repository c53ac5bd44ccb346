"use strict";

// One page of pairs at a time. What is decided lives here, and in the browser's storage under the hash of the pairs.
const { finding, perPage, names, pairs } = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const key = `tophat.duplicates.${finding}`;
const pages = Math.max(1, Math.ceil(pairs.length / perPage));
const removed = recall() ?? pairs.map((pair) => pair[1] === 1);
let page = 0;

function recall() {
  try {
    const text = localStorage.getItem(key);
    return text !== null && text.length === pairs.length && /^[01]*$/.test(text) ? [...text].map((c) => c === "1") : null;
  } catch {
    return null; // a browser that keeps nothing
  }
}

function remember() {
  try {
    localStorage.setItem(key, removed.map((out) => (out ? "1" : "0")).join(""));
  } catch {
    // as above
  }
}

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function side(title, [name, index, file, own], label) {
  const shown = own ?? names[name][1];
  const place = own === null ? ` [${index}]` : "";
  const text = `${label}: ${shown}${place}`;
  let picture;
  if (file === null) {
    picture = element("span", "picture blank", "not shown");
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", `Not shown: ${text}`);
  } else {
    const image = element("img");
    image.alt = text;
    image.loading = "lazy";
    image.src = `assets/${file}`;
    picture = element("span", "picture", image);
  }
  return element("figure", "", picture, element("figcaption", "", element("b", "", title), element("bdi", "", shown), place));
}

function card(rank) {
  const [distance, , image, labeled, set] = pairs[rank];
  const box = element("input");
  box.type = "checkbox";
  box.checked = removed[rank];
  const item = element("li", "pair");
  const cut = element("button", "", "Remove to here");
  cut.type = "button";
  cut.title = "Remove this pair's image and those of all nearer pairs; keep the others";
  cut.setAttribute("aria-label", `Remove the images of ranks 0 to ${rank}, keep the others`);
  item.append(
    element("div", "head", element("b", "", `#${rank}`), element("span", "", `distance ${distance.toFixed(4)}`)),
    element("div", "sides", side("U", image, "image of U"), side(names[set][1], labeled, "labeled image")),
    element("div", "foot", element("label", "", box, "Remove from U"), cut),
  );
  item.dataset.rank = rank;
  const paint = () => item.classList.toggle("out", removed[rank]);
  box.addEventListener("change", () => {
    removed[rank] = box.checked;
    paint();
    changed();
  });
  cut.addEventListener("click", () => {
    removed.forEach((_, other) => (removed[other] = other <= rank));
    changed();
    draw();
  });
  paint();
  return item;
}

function changed() {
  at("marked").textContent = removed.filter(Boolean).length.toLocaleString("en-US");
  remember();
}

function draw() {
  const ranks = pairs.map((_, rank) => rank).slice(page * perPage, (page + 1) * perPage);
  at("pairs").replaceChildren(...ranks.map(card));
  at("page").value = page + 1;
  at("previous").disabled = page === 0;
  at("next").disabled = page === pages - 1;
}

function turn(to) {
  page = Math.min(pages - 1, Math.max(0, to));
  draw();
  scrollTo(0, 0);
}

function markPage(out) {
  for (let rank = page * perPage; rank < Math.min(pairs.length, (page + 1) * perPage); rank++) removed[rank] = out;
  changed();
  draw();
}

function save() {
  const chosen = (out) => pairs.filter((_, rank) => removed[rank] === out).map(([, , [name, index]]) => [names[name][0], index]);
  const content = { format: "tophat.duplicates.decisions/1", finding, remove: chosen(true), keep: chosen(false) };
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/json" }));
  link.download = `decisions-${finding}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

if (pairs.length) {
  at("pages").textContent = pages.toLocaleString("en-US");
  at("page").max = pages;
  at("previous").addEventListener("click", () => turn(page - 1));
  at("next").addEventListener("click", () => turn(page + 1));
  at("page").addEventListener("change", () => turn(Math.trunc(Number(at("page").value) || 1) - 1));
  at("all").addEventListener("click", () => markPage(true));
  at("none").addEventListener("click", () => markPage(false));
  at("reset").addEventListener("click", () => {
    pairs.forEach((pair, rank) => (removed[rank] = pair[1] === 1));
    changed();
    draw();
  });
  at("save").addEventListener("click", save);
  at("marked").textContent = removed.filter(Boolean).length.toLocaleString("en-US");
  draw();
}
