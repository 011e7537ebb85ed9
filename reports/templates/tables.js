"use strict";
(() => {
  const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;

  // A filter form names the element it filters; what it hides or shows carries data-status, blanks between.
  for (const form of document.querySelectorAll("form.filter")) {
    const target = document.getElementById(form.dataset.target);
    const items = [...target.querySelectorAll("[data-status]")];
    const texts = items.map((item) => (item.dataset.text ?? (item.querySelector(".said") ?? item).textContent).toLowerCase());
    const [text, status] = form.querySelectorAll("input, select");
    const apply = () => {
      let shown = 0;
      items.forEach((item, number) => {
        const wanted = !status?.value || item.dataset.status.split(" ").includes(status.value);
        item.hidden = !(wanted && texts[number].includes(text.value.trim().toLowerCase()));
        shown += item.hidden ? 0 : 1;
      });
      for (const group of target.querySelectorAll("[data-group]")) {
        group.hidden = !group.querySelector("[data-status]:not([hidden])");
      }
      form.querySelector("output").textContent = `${shown} of ${plural(items.length, form.dataset.word)} shown`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // A sortable table sorts within each of its bodies; a body's group heading stays first.
  const key = (row, column) => {
    const cell = row.cells[column];
    const value = cell?.dataset.value ?? cell?.textContent.trim() ?? "";
    return value !== "" && Number.isFinite(Number(value)) ? Number(value) : value;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
        for (const body of table.tBodies) {
          const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
          rows.sort((a, b) => sign * compare(key(a, column), key(b, column)));
          body.append(...rows);
        }
      });
    });
  }

  // Paper shows what a screen unfolds.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => (details.open = true)));
})();
