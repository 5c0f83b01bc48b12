// Light or dark: the system's choice, unless the switch has said otherwise. Runs before the page is
// drawn, so that it does not flash.
"use strict";
(() => {
  const STEPS = ["auto", "light", "dark"];
  const root = document.documentElement;
  const remembered = () => {
    try { return localStorage.getItem("flexpert.theme"); } catch { return null; }
  };
  const apply = (choice) => {
    if (choice === "light" || choice === "dark") root.dataset.theme = choice;
    else delete root.dataset.theme;
  };
  let choice = STEPS.includes(remembered()) ? remembered() : "auto";
  apply(choice);
  const tell = () => document.dispatchEvent(new Event("themechange"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      document.getElementById("theme-now").textContent = choice;
      button.setAttribute("aria-label", `Theme: ${choice}. Switch to the next.`);
    };
    button.addEventListener("click", () => {
      choice = STEPS[(STEPS.indexOf(choice) + 1) % STEPS.length];
      try { localStorage.setItem("flexpert.theme", choice); } catch { /* not kept, then */ }
      apply(choice);
      show();
      tell();
    });
    show();
  });
})();
