"use strict";

// Sorting. Missing values stay at the end in both directions.
const body = document.querySelector("#results tbody");
const headings = [...document.querySelectorAll("#results thead tr:last-child th")];
headings.forEach((heading, column) => {
  const button = heading.querySelector("button");
  button.addEventListener("click", () => {
    const other = { ascending: "descending", descending: "ascending" };
    const direction = other[heading.getAttribute("aria-sort")] ?? button.dataset.first;
    headings.forEach((each) => each.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const rank = (text) => (text === "" || Number.isNaN(parseFloat(text)) ? 1 : 0);
    const compare = (a, b) =>
      column === 0
        ? sign * a.localeCompare(b, undefined, { numeric: true })
        : rank(a) - rank(b) || (rank(a) ? 0 : sign * (parseFloat(a) - parseFloat(b)));
    const rows = [...body.rows].sort((a, b) => compare(value(a), value(b)));
    body.append(...rows);
  });
});

// Where the clipboard is out of reach, the command is left selected.
const copy = document.getElementById("copy");
copy.addEventListener("click", async () => {
  const command = document.getElementById("command");
  try {
    await navigator.clipboard.writeText(command.textContent);
    copy.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(command);
    copy.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
  setTimeout(() => (copy.textContent = "Copy"), 2000);
});

addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((each) => (each.open = true));
});
