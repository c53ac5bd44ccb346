"use strict";

// Finds classes among all, those on other pages of the list too. Their names are loaded when the search is first used.
const MOST = 200;
const at = (id) => document.getElementById(id);
let loading = null;

function load() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "assets/classes.js";
    script.addEventListener("load", () => resolve(globalThis.tophatClasses));
    script.addEventListener("error", reject);
    document.head.append(script);
  });
  return loading;
}

function entry({ perPage }, id, [name, count, lowest]) {
  const link = document.createElement("a");
  link.href = `page-${String(Math.floor(id / perPage) + 1).padStart(4, "0")}.html#class-${id}`;
  const shown = document.createElement("bdi");
  shown.textContent = name;
  link.append(shown);
  const facts = document.createElement("span");
  facts.textContent = `${count.toLocaleString("en-US")} · ${lowest === null ? "–" : lowest.toFixed(3)}`;
  const item = document.createElement("li");
  item.append(link, " ", facts);
  return item;
}

async function find() {
  const words = at("search").value.trim().toLowerCase();
  const data = words ? await load() : null;
  if (words !== at("search").value.trim().toLowerCase()) return; // typed on while the names were loading
  at("listed").hidden = data !== null;
  at("matches").hidden = data === null;
  if (data === null) {
    at("found").textContent = "";
    return;
  }
  const ids = [...data.classes.keys()].filter((id) => String(id) === words.replace("#", "") || data.classes[id][0].toLowerCase().includes(words));
  at("matches").replaceChildren(...ids.slice(0, MOST).map((id) => entry(data, id, data.classes[id])));
  at("found").textContent = `${ids.length.toLocaleString("en-US")} found${ids.length > MOST ? `, the first ${MOST} shown` : ""}`;
}

at("finder").hidden = false;
at("search").addEventListener("focus", load, { once: true });
at("search").addEventListener("input", find);
at("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") at("matches").querySelector("a")?.click();
});
