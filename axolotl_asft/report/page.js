"use strict";
(() => {
  document.documentElement.classList.add("js");
  const find = (id) => document.getElementById(id);
  const read = (id) => (find(id) ? JSON.parse(find(id).textContent) : null);
  const number = (value) => Number(value.toPrecision(3)).toString();
  const percent = (value) => {
    const shown = 100 * value;
    if (shown && shown < 0.05) return "under 0.1\u00a0%";
    return `${shown.toFixed(shown && shown < 9.95 ? 1 : 0)}\u00a0%`;
  };
  const multiple = (value) => (value < 0.995 ? percent(value) : `${number(value)}\u00a0times`);
  const words = {
    relative: (value) => `${multiple(value)} of what alignment moved`,
    drift: (value) => `${percent(value)} of the update off the direction`,
    norm: (value) => `‖dW‖ ${number(value)}`,
  };

  // Tell about the cell under the pointer or the finger.
  const watch = (grid, readout, tell) => {
    const cells = [...grid.querySelectorAll("b")];
    const idle = readout.textContent;
    const show = (event) => {
      const at = cells.indexOf(event.target);
      if (at >= 0) readout.textContent = tell(at);
    };
    grid.addEventListener("pointerover", show);
    grid.addEventListener("click", show);
    grid.addEventListener("pointerleave", () => { readout.textContent = idle; });
    return cells;
  };
  const place = (data, at) => {
    const columns = data.layers.length;
    return `layer ${data.layers[at % columns]}, ${data.kinds[Math.floor(at / columns)]}`;
  };

  const heat = read("heat-data");
  if (heat) {
    const slider = find("time");
    const play = find("play");
    const form = find("heat-controls");
    let frame = heat.steps.length - 1;
    const spread = Math.log(0.5) / Math.log(heat.middle);
    let measure = "relative";
    let timer = null;
    const tell = (at) => {
      const told = Object.keys(heat.measures).map((name) => {
        const value = heat.measures[name].frames[frame][at];
        return value === null ? null : words[name](value);
      }).filter(Boolean);
      if (!told.length) return `${place(heat, at)}: nothing is trained here`;
      if (heat.measures.relative.frames[frame][at] === null) told.unshift("alignment did not touch it");
      return `${place(heat, at)}: ${told.join(", ")}`;
    };
    const cells = watch(find("heat"), find("readout"), tell);
    const paint = () => {
      const chosen = heat.measures[measure];
      cells.forEach((cell, at) => {
        const value = chosen.frames[frame][at];
        cell.classList.toggle("none", value === null);
        if (value !== null) cell.style.setProperty("--v", ((value / chosen.highest) ** spread).toFixed(3));
      });
      const label = measure === "norm" ? number : multiple;
      find("highest").textContent = label(chosen.highest);
      find("middle").textContent = label(chosen.highest * heat.middle);
      find("readout").textContent = `at step ${heat.steps[frame]}: ${chosen.formula}`;
      if (slider) {
        slider.value = frame;
        slider.setAttribute("aria-valuetext", `step ${heat.steps[frame]}`);
        find("time-shown").textContent = `step ${heat.steps[frame]}`;
      }
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", (event) => {
      if (event.target.name === "measure") { measure = event.target.value; paint(); }
    });
    if (slider) {
      slider.addEventListener("input", () => { frame = Number(slider.value); paint(); });
      slider.addEventListener("pointerdown", stop);
      play.addEventListener("click", () => {
        if (timer) { stop(); return; }
        if (frame === heat.steps.length - 1) frame = -1;
        play.textContent = "Pause";
        timer = setInterval(() => {
          frame += 1;
          paint();
          if (frame === heat.steps.length - 1) stop();
        }, Math.max(60, 4000 / heat.steps.length));
      });
    }
  }

  const share = read("share-data");
  if (share) {
    watch(find("share"), find("share-readout"), (at) => {
      const value = share.cells[at];
      return `${place(share, at)}: ${value === null ? "not known" : `${number(value)} times chance`}`;
    });
  }
})();
