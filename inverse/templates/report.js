"use strict";
for (const player of document.querySelectorAll(".player")) {
  const film = JSON.parse(player.querySelector("script").textContent);
  const pictures = player.querySelectorAll(".track img");
  const [slider, output] = [player.querySelector("input"), player.querySelector("output")];
  const show = () => {
    const i = Number(slider.value);
    pictures.forEach((picture, track) => { picture.src = film.tracks[track][i]; });
    output.textContent = film.labels[i];
    slider.setAttribute("aria-valuetext", film.labels[i]);
  };
  player.querySelector("label").hidden = false;
  slider.addEventListener("input", show);
  show(); // a browser may have kept the slider's place from before a reload
}
