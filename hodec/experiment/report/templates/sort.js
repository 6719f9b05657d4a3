// The heads of a table of layers become buttons that sort its rows: upwards, downwards, as they were.
for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[0], first = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, at) => row.cells[at].title || row.cells[at].textContent.trim();
  const number = (text) => parseFloat(text.replace(/,/g, "").replace("\u2212", "-"));
  const compare = (a, b) => (isNaN(number(a)) || isNaN(number(b)) ? a.localeCompare(b, "en", { numeric: true })
    : number(a) - number(b) || a.localeCompare(b, "en", { numeric: true }));
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")] || "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      const rows = next === "none" ? first : [...first].sort((a, b) => compare(value(a, at), value(b, at)));
      body.append(...(next === "descending" ? rows.reverse() : rows));
    });
  });
}
