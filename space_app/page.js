// What a browser must do by itself: keys, the numbers of a token, the name of the slider's place.
(() => {
  // Ctrl+Enter or ⌘+Enter in a box starts what its tab is for.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const box = event.target.closest?.(".starts");
    if (!box) return;
    event.preventDefault();
    event.stopPropagation();
    const starts = { prompt: "run", text: "measure", "blind-prompt": "blind-run" };
    // Gradio takes a box's text up with its input event, one moment before it reads it for the click
    setTimeout(() => document.getElementById(starts[box.id] || "between-run")?.click(), 50);
  }, true);

  // One token at a time can be reached with Tab; arrow keys walk on from there.
  const say = (token) => {
    const box = token.closest(".tokens");
    box.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
    token.classList.add("chosen");
    box.parentElement.querySelector(".detail").textContent = token.dataset.say;
  };
  document.addEventListener("click", (event) => {
    const token = event.target.closest?.(".token");
    if (token) say(token);
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.classList?.contains("token")) say(event.target);
  });
  document.addEventListener("keydown", (event) => {
    const token = event.target.closest?.(".token");
    if (!token) return;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const all = [...token.parentElement.querySelectorAll(".token")];
    let to = all.indexOf(token) + (steps[event.key] || 0);
    if (event.key === "Home") to = 0;
    if (event.key === "End") to = all.length - 1;
    if (all[to] && all[to] !== token) {
      event.preventDefault();
      token.tabIndex = -1;
      all[to].tabIndex = 0;
      all[to].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      say(token);
    }
  });

  // The slider has numbered places; what they mean is λ.
  const place = (slider) => {
    const value = document.getElementById("lambda-value");
    const stops = value?.dataset.stops.split("|");
    if (!stops) return;
    value.textContent = stops[Number(slider.value)];
    slider.setAttribute("aria-valuetext", value.textContent);
  };
  document.addEventListener("input", (event) => {
    if (event.target.matches?.("#lambda input[type=range]")) place(event.target);
  });
  // Gradio tells of a slider's release by the pointer only: by keys, it is when they come to rest.
  let resting;
  document.addEventListener("keyup", (event) => {
    if (!event.target.matches?.("#lambda input[type=range]") || !/^(Arrow|Page|Home|End)/.test(event.key)) return;
    clearTimeout(resting);
    resting = setTimeout(() => document.getElementById("between-run")?.click(), 300);
  });
  new MutationObserver(() => {
    document.querySelectorAll(".tokens").forEach((box) => {
      if (!box.querySelector('.token[tabindex="0"]')) box.querySelector(".token")?.setAttribute("tabindex", "0");
    });
    const slider = document.querySelector("#lambda input[type=range]:not([aria-valuetext])");
    if (slider) place(slider);
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
