// The browser's half of bikd.explorer.Panel: it draws what Python sends, and nothing else.
//
// Python sets every trait of the panel and raises `version` last. The page then draws once:
// a map of the training images by cross-entropy, and below it the picked image. A click on
// the map returns the number of the nearest shown image to Python, as `wanted`.
//
// The traits, as nbs/16_explorer.ipynb defines them:
//   axes                  {low, high}: the range of both axes of the map, nats
//   grid                  float32 (n, n): weights on the map [teacher, student]; empty without f_φ
//   points                float32 (N, 3): teacher's and student's cross-entropy, weight
//   shown                 uint8 (N): 1 for images of the chosen class
//   picked, wanted        number of an image, or -1
//   title, said           the lines above and below the map
//   detail, image, side   the picked image: what is known about it, its RGB bytes, its side
//   epoch, version        epoch at hand, counted from 1; number of the last change


// --- Numbers from Python --------------------------------------------------------------------

// A trait of bytes arrives as a DataView into a larger buffer. It is copied, because a typed
// array must begin at a multiple of its element's size.
function copied(view) {
  if (!view || !view.byteLength) return new ArrayBuffer(0);
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

const floats = (view) => new Float32Array(copied(view));
const bytes = (view) => new Uint8Array(copied(view));


// --- Colours --------------------------------------------------------------------------------

const ORANGE = '#d55e00'; // the student, and the ring around the picked image
const BLACK = '#000'; // the teacher
const INK = '#333'; // text and frames

// viridis at 0, 1/8, ..., 1, as [red, green, blue]
const VIRIDIS = [
  '#440154', '#472d7b', '#3b528b', '#2c728e', '#21918c', '#28ae80', '#5ec962', '#addc30', '#fde725',
].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

// The colour of a weight from 0 to 1, as [red, green, blue]: the same in all panels.
function viridis(weight) {
  const t = 8 * Math.min(1, Math.max(0, weight));
  const i = Math.min(7, Math.floor(t));
  return VIRIDIS[i].map((from, c) => Math.round(from + (t - i) * (VIRIDIS[i + 1][c] - from)));
}

const colour = (weight) => `rgb(${viridis(weight)})`;


// --- Canvases -------------------------------------------------------------------------------

// A canvas of w × h CSS pixels, sharp on screens of any density, with its drawing context.
function addCanvas(parent, w, h, className, label) {
  const canvas = document.createElement('canvas');
  const density = window.devicePixelRatio || 1;
  canvas.className = className;
  canvas.width = w * density;
  canvas.height = h * density;
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  canvas.title = label;
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', label);
  parent.appendChild(canvas);
  const g = canvas.getContext('2d');
  g.scale(density, density);
  return [canvas, g];
}

// A small picture of n × n pixels to be drawn at any size; rgb(i) gives [red, green, blue].
function picture(n, rgb) {
  const canvas = document.createElement('canvas');
  canvas.width = n;
  canvas.height = n;
  const pixels = new ImageData(n, n);
  for (let i = 0; i < n * n; i++) pixels.data.set([...rgb(i), 255], 4 * i);
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

function circle(g, x, y, radius) {
  g.beginPath();
  g.arc(x, y, radius, 0, 2 * Math.PI);
}

function write(g, text, x, y, align) {
  g.textAlign = align;
  g.fillText(text, x, y);
}

// Words one after the other, each in its colour: [word, style].
function writeInColours(g, words, x, y) {
  for (const [word, style] of words) {
    g.fillStyle = style;
    write(g, word, x, y, 'left');
    x += g.measureText(word).width;
  }
}


// --- The map --------------------------------------------------------------------------------

const MAP = { w: 430, h: 340, left: 48, right: 62, top: 8, bottom: 38 }; // pixels
const FRAME = { // of the plot inside it
  x0: MAP.left,
  x1: MAP.w - MAP.right,
  y0: MAP.h - MAP.bottom, // the bottom: y grows downwards
  y1: MAP.top,
};
const REACH = 15; // how far from an image a click may be, pixels

// Functions from nats to pixels, and the axes' ends as powers of ten.
function scales(axes) {
  const low = Math.log10(axes.low);
  const high = Math.log10(axes.high);
  const share = (nats) => {
    const inside = Math.min(Math.max(nats, axes.low), axes.high);
    return (Math.log10(inside) - low) / (high - low);
  };
  return {
    x: (nats) => FRAME.x0 + share(nats) * (FRAME.x1 - FRAME.x0),
    y: (nats) => FRAME.y0 - share(nats) * (FRAME.y0 - FRAME.y1),
    low,
    high,
  };
}

// Where the training images lie, in pixels. Without a teacher they lie on the left edge; an
// image whose student's cross-entropy is not known has y = NaN and is not drawn.
function positions(model) {
  const { x, y } = scales(model.get('axes'));
  const points = floats(model.get('points'));
  const shown = bytes(model.get('shown'));
  return Array.from({ length: points.length / 3 }, (_, i) => {
    const [teacher, student, weight] = points.subarray(3 * i, 3 * i + 3);
    return {
      x: isNaN(teacher) ? FRAME.x0 : x(teacher),
      y: isNaN(student) ? NaN : y(student),
      weight,
      shown: Boolean(shown[i]),
    };
  });
}

// f_φ on the whole map; a plain grey where the method has none.
function drawSurface(g, grid) {
  const n = Math.round(Math.sqrt(grid.length));
  const { x0, x1, y0, y1 } = FRAME;
  if (n === 0) {
    g.fillStyle = '#f4f4f4';
    g.fillRect(x0, y1, x1 - x0, y0 - y1);
    return;
  }
  // the grid is indexed [teacher, student] and begins at the bottom left, a picture at the top
  const weight = (column, row) => grid[column * n + (n - 1 - row)];
  const surface = picture(n, (i) => viridis(weight(i % n, Math.floor(i / n))));
  g.drawImage(surface, x0, y1, x1 - x0, y0 - y1);
}

function drawImages(g, images, faint) {
  g.globalAlpha = faint ? 0.15 : 1;
  g.strokeStyle = faint ? '#999' : 'white';
  g.lineWidth = 0.7;
  for (const image of images) {
    if (image.shown === faint || isNaN(image.y)) continue;
    circle(g, image.x, image.y, faint ? 2 : 3.2);
    g.fillStyle = colour(image.weight);
    g.fill();
    g.stroke();
  }
  g.globalAlpha = 1;
}

// An orange ring with a white rim, to be seen on every colour.
function drawRing(g, image) {
  circle(g, image.x, image.y, 8);
  for (const [style, width] of [['white', 4], [ORANGE, 2]]) {
    g.strokeStyle = style;
    g.lineWidth = width;
    g.stroke();
  }
}

function drawAxes(g, axes) {
  const { x, y, low, high } = scales(axes);
  const { x0, x1, y0, y1 } = FRAME;
  g.fillStyle = INK;
  g.strokeStyle = INK;
  g.lineWidth = 1;
  g.strokeRect(x0, y1, x1 - x0, y0 - y1);
  for (let power = Math.ceil(low); power <= high; power++) {
    const label = power < 0 ? `1e${power}` : String(10 ** power);
    write(g, label, x(10 ** power), y0 + 14, 'center');
    write(g, label, x0 - 4, y(10 ** power) + 4, 'right');
  }
  write(g, 'teacher cross-entropy (nats)', (x0 + x1) / 2, MAP.h - 6, 'center');
  g.save();
  g.translate(11, (y0 + y1) / 2);
  g.rotate(-Math.PI / 2);
  write(g, 'student cross-entropy (nats)', 0, 0, 'center');
  g.restore();
}

// The bar of weights from 0 to 1, on the right.
function drawColourBar(g) {
  const { x1, y0, y1 } = FRAME;
  const steps = 100;
  const step = (y0 - y1) / steps;
  for (let k = 0; k < steps; k++) {
    g.fillStyle = colour(k / (steps - 1));
    g.fillRect(x1 + 10, y0 - (k + 1) * step, 12, step + 1);
  }
  g.fillStyle = INK;
  for (const w of [0, 0.5, 1]) write(g, w, x1 + 26, y0 - w * (y0 - y1) + 4, 'left');
  write(g, 'w', x1 + 46, (y0 + y1) / 2 + 4, 'left');
}

function drawMap(g, model) {
  const images = positions(model);
  const picked = images[model.get('picked')]; // undefined if there is none
  g.clearRect(0, 0, MAP.w, MAP.h);
  g.font = '11px sans-serif';
  drawSurface(g, floats(model.get('grid')));
  drawImages(g, images, true);
  drawImages(g, images, false);
  if (picked) drawRing(g, picked);
  drawAxes(g, model.get('axes'));
  drawColourBar(g);
}

// The number of the shown image that is nearest to a place on the map, or -1.
function nearest(model, x, y) {
  let best = -1;
  let least = REACH;
  positions(model).forEach((image, i) => {
    const distance = Math.hypot(image.x - x, image.y - y); // never less, if NaN
    if (image.shown && distance < least) {
      least = distance;
      best = i;
    }
  });
  return best;
}


// --- The picked image -----------------------------------------------------------------------

const SAMPLE = { w: MAP.w, h: 120, top: 14, bottom: 102, text: 9, label: 114 }; // pixels
const HEIGHT = SAMPLE.bottom - SAMPLE.top; // of its three plots: a probability or weight of 1
const PICTURE = { x: 4, side: HEIGHT };
const BARS = { x: 108, w: 150 };
const CURVES = { x0: 288, x1: SAMPLE.w - 8 };
const MANY_CLASSES = 20; // with more, the classes' numbers would overlap

function drawPicture(g, rgb, side) {
  g.imageSmoothingEnabled = false;
  const image = picture(side, (i) => rgb.subarray(3 * i, 3 * i + 3));
  g.drawImage(image, PICTURE.x, SAMPLE.top, PICTURE.side, PICTURE.side);
}

// What teacher (black) and student (orange) say at the end of training, class by class.
function drawProbabilities(g, detail) {
  const classes = detail.p_teacher.length;
  const step = BARS.w / classes;
  const bar = (x, p, style) => {
    g.fillStyle = style;
    g.fillRect(x, SAMPLE.bottom - HEIGHT * p, 0.4 * step, HEIGHT * p);
  };
  const key = [['p: ', INK], ['■ teacher  ', BLACK], ['■ student', ORANGE]];
  writeInColours(g, key, BARS.x, SAMPLE.text);
  for (let c = 0; c < classes; c++) {
    const x = BARS.x + c * step;
    bar(x, detail.p_teacher[c], BLACK);
    bar(x + 0.42 * step, detail.p_student[c], ORANGE);
    if (classes > MANY_CLASSES) continue;
    const right = c === detail.label;
    g.fillStyle = right ? BLACK : '#888';
    g.font = right ? 'bold 10px sans-serif' : '10px sans-serif';
    write(g, c, BARS.x + (c + 0.4) * step, SAMPLE.label, 'center');
  }
  g.font = '10px sans-serif';
  g.strokeStyle = '#999';
  g.beginPath();
  g.moveTo(BARS.x, SAMPLE.bottom);
  g.lineTo(BARS.x + BARS.w, SAMPLE.bottom);
  g.stroke();
}

// One weight through training; null, where there was none, leaves a gap.
function drawCurve(g, weights, x, y) {
  let drawing = false;
  g.beginPath();
  weights.forEach((w, i) => {
    if (w === null) {
      drawing = false;
      return;
    }
    if (drawing) g.lineTo(x(i), y(w));
    else g.moveTo(x(i), y(w));
    drawing = true;
  });
  g.stroke();
}

// Its weights through training, and a line at the epoch at hand.
function drawWeights(g, detail, epoch) {
  const { x0, x1 } = CURVES;
  const epochs = detail.w_hard.length;
  const x = (i) => x0 + (epochs > 1 ? i / (epochs - 1) : 0) * (x1 - x0);
  const y = (w) => SAMPLE.bottom - HEIGHT * w;
  g.strokeStyle = '#999';
  g.strokeRect(x0, SAMPLE.top, x1 - x0, HEIGHT);
  g.fillStyle = INK;
  write(g, '1', x0 - 3, SAMPLE.top + 6, 'right');
  write(g, '0', x0 - 3, SAMPLE.bottom + 2, 'right');
  write(g, `epoch 1 to ${epochs}`, (x0 + x1) / 2, SAMPLE.label, 'center');
  g.strokeStyle = '#bbb';
  g.beginPath();
  g.moveTo(x(epoch - 1), SAMPLE.top);
  g.lineTo(x(epoch - 1), SAMPLE.bottom);
  g.stroke();
  g.strokeStyle = ORANGE;
  g.lineWidth = 1.5;
  for (const [name, dashes] of [['w_hard', []], ['w_soft', [4, 3]]]) {
    if (!detail[name]) continue;
    g.setLineDash(dashes);
    drawCurve(g, detail[name], x, y);
  }
  g.setLineDash([]);
  g.lineWidth = 1;
  write(g, 'w: hard —  soft - -', x0, SAMPLE.text, 'left');
}

function drawSample(g, model) {
  const detail = model.get('detail');
  g.clearRect(0, 0, SAMPLE.w, SAMPLE.h);
  g.font = '10px sans-serif';
  if (!detail.title) return; // no image is picked
  drawPicture(g, bytes(model.get('image')), model.get('side'));
  drawProbabilities(g, detail);
  drawWeights(g, detail, model.get('epoch'));
}


// --- The panel ------------------------------------------------------------------------------

function addLine(parent, className) {
  const line = document.createElement('div');
  line.className = className;
  parent.appendChild(line);
  return line;
}

function render({ model, el }) {
  const panel = addLine(el, 'bikd-panel');
  const title = addLine(panel, 'bikd-title');
  const [map, onMap] = addCanvas(
    panel, MAP.w, MAP.h, 'bikd-map',
    'training images by cross-entropy of teacher and student; click one',
  );
  const said = addLine(panel, 'bikd-said');
  const [, onSample] = addCanvas(
    panel, SAMPLE.w, SAMPLE.h, 'bikd-sample', 'the picked image, its probabilities and weights',
  );

  function draw() {
    title.textContent = model.get('title');
    said.textContent = model.get('said');
    drawMap(onMap, model);
    drawSample(onSample, model);
    panel.dataset.drawn = model.get('version');
  }

  function pick(event) {
    const at = map.getBoundingClientRect();
    const i = nearest(model, event.clientX - at.left, event.clientY - at.top);
    if (i < 0) return;
    model.set('wanted', i);
    model.save_changes();
  }

  model.on('change:version', draw);
  map.addEventListener('click', pick);
  draw();
}

export default { render };
