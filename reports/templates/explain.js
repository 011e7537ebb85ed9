"use strict";
(() => {
  const form = document.querySelector("form.controls");
  const stages = [...document.querySelectorAll("section.stage")];
  const links = [...document.querySelectorAll("nav a")];
  const [previous, next] = form.querySelectorAll("button");
  const all = form.querySelector("input");
  const chosen = form.querySelector("select");
  let step = 0;

  const show = () => {
    stages.forEach((stage, number) => (stage.hidden = !all.checked && number !== step));
    links.forEach((link, number) => (number === step && !all.checked ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current")));
    previous.disabled = all.checked || step === 0;
    next.disabled = all.checked || step === stages.length - 1;
    form.querySelector("output").textContent = all.checked ? "" : `Stage ${step + 1} of ${stages.length}`;
  };

  for (const button of [previous, next]) {
    button.addEventListener("click", () => {
      step += Number(button.value);
      show();
    });
  }
  links.forEach((link, number) => link.addEventListener("click", () => {
    step = number;
    show();
  }));
  all.addEventListener("change", show);
  chosen?.addEventListener("change", () => {
    for (const item of document.querySelectorAll("[data-gt]")) {
      item.classList.toggle("chosen", item.dataset.gt === chosen.value);
    }
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  const asked = stages.findIndex((stage) => `#${stage.id}` === location.hash);
  step = Math.max(asked, 0);
  form.hidden = false;
  show();
  addEventListener("beforeprint", () => stages.forEach((stage) => (stage.hidden = false)));
  addEventListener("afterprint", show);
})();
