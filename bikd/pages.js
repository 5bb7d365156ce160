// Sorts the table of runs by the column whose title is clicked; a second click turns the order round.
const table = document.querySelector("table");
const heads = [...table.tHead.rows[0].cells];

function valueOf(row, column) {
  const text = row.cells[column].dataset.value;
  if (text === undefined) return null;
  return text !== "" && isFinite(text) ? Number(text) : text;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // missing values come last
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b));
}

function sortBy(column) {
  const down = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((one, other) => {
    const a = valueOf(one, column);
    const b = valueOf(other, column);
    const order = compare(a, b);
    return down && a !== null && b !== null ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

heads.forEach((head, column) => {
  const button = head.querySelector("button");
  if (button) button.addEventListener("click", () => sortBy(column));
});
