"use strict";
// The loss of a job as a curve, and the lengths of a file's examples as bars: drawn, and said in words.

const MAX_POINTS = 300;

/** At most MAX_POINTS of the points, the first and the last one among them. */
function thin(points) {
  if (points.length <= MAX_POINTS) return points;
  const last = points.length - 1;
  return Array.from({ length: MAX_POINTS }, (_, index) => points[Math.round((index * last) / (MAX_POINTS - 1))]);
}

/**
 * Draw the loss over the steps.
 * @param figure with an SVG image of two lines, and a caption
 * @param curve { train: [[step, loss], ...], valid: [...] }, by step
 * @param steps all steps of the job; 0: not known
 */
function drawCurve(figure, curve, steps) {
  const all = [...curve.train, ...curve.valid];
  figure.hidden = curve.train.length < 2;
  if (figure.hidden) return;
  const last = Math.max(steps, ...all.map(([step]) => step), 1);
  // A few wild first steps would flatten all others.
  const losses = all.map(([, loss]) => loss).sort((one, other) => one - other);
  const top = Math.max(losses[Math.ceil(0.98 * (losses.length - 1))], losses[0] + 1e-6), bottom = Math.min(losses[0], 0.5 * losses[0]);
  const place = ([step, loss]) => `${((600 * step) / last).toFixed(1)},${(176 - 172 * Math.min(1, (loss - bottom) / (top - bottom))).toFixed(1)}`;
  for (const name of ["train", "valid"]) {
    figure.querySelector(`.${name}`).setAttribute("points", thin(curve[name]).map(place).join(" "));
  }
  figure.querySelector(".top").textContent = top.toFixed(2);
  figure.querySelector(".bottom").textContent = bottom.toFixed(2);
  figure.querySelector("figcaption").textContent = sayCurve(curve, steps);
}

function sayCurve({ train, valid }, steps) {
  const [first, now] = [train[0], train[train.length - 1]];
  const best = valid.length ? Math.min(...valid.map(([, loss]) => loss)) : null;
  return `Loss ${now[1].toFixed(3)} at step ${now[0]}${steps ? ` of ${steps}` : ""}, ${first[1].toFixed(3)} at step ${first[0]}` +
    `${best === null ? "" : `; lowest on the validation file (dashed) ${best.toFixed(3)}`}. In nats per token.`;
}

/** Bars of how many examples have which length. `counts` and `edges` (one more) are of equal bins. */
function drawLengths(figure, counts, edges, unit) {
  figure.hidden = counts.length < 2;
  if (figure.hidden) return;
  const image = figure.querySelector("svg"), highest = Math.max(...counts, 1), width = 240 / counts.length;
  image.replaceChildren(...counts.map((count, index) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect"), height = count ? Math.max(1, (46 * count) / highest) : 0;
    for (const [name, value] of Object.entries({ x: index * width + 0.5, y: 48 - height, width: width - 1, height })) bar.setAttribute(name, value.toFixed(2));
    return bar;
  }));
  const most = counts.indexOf(highest);
  const words = `Lengths: ${edges[0]} to ${edges[edges.length - 1]} ${unit}; most examples have ${edges[most]} to ${edges[most + 1]}.`;
  image.setAttribute("aria-label", words);
  figure.querySelector("figcaption").textContent = words;
}
