(() => {
"use strict";
const root = document.documentElement;
root.classList.add("js");

// Theme: as the system has it, unless the reader chooses.
const button = document.querySelector(".theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const keep = (theme) => { try { localStorage.setItem("stockflow-theme", theme); } catch { /* a file may have none */ } };
const kept = () => { try { return localStorage.getItem("stockflow-theme"); } catch { return null; } };
const current = () => root.dataset.theme || (dark.matches ? "dark" : "light");
const say = () => { button.textContent = current() === "dark" ? "Light theme" : "Dark theme"; };
if (["light", "dark"].includes(kept())) root.dataset.theme = kept();
button.hidden = false;
say();
dark.addEventListener("change", say);
button.addEventListener("click", () => {
  root.dataset.theme = current() === "dark" ? "light" : "dark";
  keep(root.dataset.theme);
  say();
});

// Tables: a button in every heading sorts; numbers by value, what is missing last.
const valueOf = (cell) => {
  const text = (cell.dataset.value ?? cell.textContent).trim();
  const number = Number(text.replaceAll(",", ""));
  return text === "" || text === "-" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
};
const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const sorter = document.createElement("button");
    sorter.type = "button";
    sorter.append(...heading.childNodes);
    heading.append(sorter);
    sorter.addEventListener("click", () => {
      const first = heading.classList.contains("num") ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
      rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// What is wider than the page can be scrolled by keyboard too.
const reachable = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const isWide = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    const heading = box.closest("figure,section")?.querySelector("h3,h2");
    if (isWide && !box.hasAttribute("tabindex")) {
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", heading ? heading.textContent : "Table");
    }
  }
};
reachable();
addEventListener("resize", reachable);
document.addEventListener("toggle", reachable, true);

// Charts: hovering, or the arrow keys, read out one point after the other.
for (const chart of document.querySelectorAll("[data-chart]")) {
  const readout = chart.closest("figure").querySelector(".readout");
  const lines = chart.tagName === "TABLE"
    ? [...chart.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")])
    : [[...chart.querySelectorAll("[data-point]")]];
  const points = lines.flat();
  const words = new Map();
  for (const point of points) {
    const title = point.querySelector("title");
    words.set(point, title ? title.textContent : point.title);
    if (title) title.remove();
    point.removeAttribute("title");
  }
  let on = null;
  const show = (point) => {
    if (on) on.classList.remove("on");
    on = point || null;
    if (on) on.classList.add("on");
    readout.textContent = on ? words.get(on) : "";
  };
  chart.tabIndex = 0;
  chart.addEventListener("pointerover", (event) => {
    const point = event.target.closest("td,[data-point]");
    if (words.has(point)) show(point);
  });
  chart.addEventListener("pointerleave", () => { if (document.activeElement !== chart) show(null); });
  chart.addEventListener("blur", () => show(null));
  chart.addEventListener("focus", () => { if (!on && chart.matches(":focus-visible")) show(points[0]); });
  chart.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key];
    if (!move && !["Home", "End", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") { show(null); return; }
    let row = Math.max(lines.findIndex((line) => line.includes(on)), 0);
    let column = Math.max(lines[row].indexOf(on), 0);
    if (event.key === "Home") column = 0;
    else if (event.key === "End") column = lines[row].length - 1;
    else if (on) { row += move[0]; column += move[1]; }
    row = Math.min(Math.max(row, 0), lines.length - 1);
    column = Math.min(Math.max(column, 0), lines[row].length - 1);
    show(lines[row][column]);
    on.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details[data-print]")) details.open = true;
});
})();
