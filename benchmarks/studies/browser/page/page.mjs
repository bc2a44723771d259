// Loads the networks, classifies what is picked or drawn, and times all of them in turns.
import * as ort from "./engine/ort.wasm.min.mjs";
import { interleaved } from "./measure.mjs";

const ROUNDS = 60, LENGTH = 15; // LENGTH in ms
const by = (id) => document.getElementById(id);

ort.env.wasm.wasmPaths = new URL("./engine/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // More would need a server with headers of its own.

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

// ------------------------------------------------------------------------------- networks

async function load(about) {
  const networks = about.networks.map((network) => ({ ...network }));
  for (const network of networks) {
    const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
    network.session = await ort.InferenceSession.create(network.file, options);
  }
  return networks;
}

/** The logits of one image, bytes. */
async function run({ session }, bytes, about) {
  const values = Float32Array.from(bytes, (byte) => about.low + about.step * byte);
  const [input] = session.inputNames, [output] = session.outputNames;
  const image = new ort.Tensor("float32", values, [1, ...about.size, 1]);
  return Array.from((await session.run({ [input]: image }))[output].data);
}

function softmax(logits) {
  const most = Math.max(...logits), powers = logits.map((x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / sum);
}

// --------------------------------------------------------------------------------- images

function paint(canvas, bytes, [height, width]) {
  Object.assign(canvas, { height, width });
  const pixels = new ImageData(width, height);
  bytes.forEach((byte, i) => pixels.data.set([byte, byte, byte, 255], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function showSamples(about, pick) {
  const buttons = about.images.map((bytes, i) => {
    const button = element("button", "", { type: "button", title: about.classes[about.labels[i]] });
    button.setAttribute("aria-label", `${about.classes[about.labels[i]]}, image ${i + 1}`);
    const canvas = document.createElement("canvas");
    paint(canvas, bytes, about.size);
    button.append(canvas);
    button.onclick = () => {
      press(button);
      pick(bytes, about.classes[about.labels[i]]);
    };
    return button;
  });
  by("samples").replaceChildren(...buttons);
  return buttons;
}

function press(button) {
  for (const other of by("samples").children) other.setAttribute("aria-pressed", other === button);
}

/** A drawing in the pixels of the network's images: white strokes on black. */
function drawable(canvas, about, pick) {
  const clear = () => paint(canvas, new Array(about.size[0] * about.size[1]).fill(0), about.size);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height];
  };
  const drawn = () => {
    press(null);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    pick(Array.from({ length: data.length / 4 }, (_, i) => data[4 * i]), null);
  };
  clear();
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    Object.assign(context, { lineWidth: canvas.width / 10, lineCap: "round", strokeStyle: "#fff" });
    context.beginPath();
    context.moveTo(...at(event));
    canvas.onpointermove = (move) => { context.lineTo(...at(move)); context.stroke(); };
  };
  canvas.onpointerup = (event) => {
    canvas.onpointermove = null;
    context.lineTo(...at(event));
    context.stroke();
    drawn();
  };
  by("clear").onclick = () => { clear(); drawn(); };
}

// -------------------------------------------------------------------------- what is shown

function card(network, i, logits, classes, label) {
  const found = softmax(logits).map((p, at) => [p, classes[at]]).sort((a, b) => b[0] - a[0]);
  const box = element("article", "", { className: "card" });
  box.style.setProperty("--color", `var(--color-${i})`);
  const rows = found.slice(0, 3).map(([p, name]) => {
    const row = element("div", "", { className: "row" });
    const track = element("span"), bar = element("div", "", { className: "bar" });
    bar.style.width = `${100 * p}%`;
    track.append(bar);
    row.append(element("span", name), track, element("span", `${(100 * p).toFixed(1)} %`));
    return row;
  });
  const answer = element("div", found[0][1], { className: "answer" });
  if (label !== null) answer.append(element("small", found[0][1] === label ? "  ✓ right" : "  ✗ wrong"));
  box.append(element("h3", network.name), answer, ...rows);
  return box;
}

function showTimes(networks, times) {
  const longest = Math.max(...Object.values(times).map((t) => t.milliseconds));
  const rows = networks.map((network, i) => {
    const t = times[network.name], [low, high] = t.quartiles;
    const row = element("div", "", { className: "time" });
    row.style.setProperty("--color", `var(--color-${i})`);
    const head = element("div"), track = element("div", "", { className: "track" });
    head.append(element("b", network.name), ` (${network.what})`);
    const bar = element("div", "", { className: "bar" });
    bar.style.width = `${(75 * t.milliseconds) / longest}%`;
    track.append(bar, element("b", `${t.milliseconds.toFixed(2)} ms`));
    const ratio = t["speedup over the first"].toFixed(2);
    const facts = [
      ...(i ? [`${ratio}\u00a0× as fast as ${networks[0].name}`] : []),
      `quartiles ${low.toFixed(2)} to ${high.toFixed(2)}\u00a0ms`,
      `file ${(network.bytes / 1000).toFixed(0)}\u00a0kB`,
      `${(100 * network.accuracy).toFixed(1)}\u00a0% of the test images right`,
    ];
    row.append(head, track, element("div", facts.join("; "), { className: "note" }));
    return row;
  });
  by("bars").replaceChildren(...rows);
}

function say(text, failed = false) {
  by("status").textContent = text;
  by("status").classList.toggle("failed", failed);
}

// ------------------------------------------------------------------------------- the page

async function main() {
  const answer = await fetch("about.json");
  if (!answer.ok) throw new Error(`about.json: ${answer.status} ${answer.statusText}`);
  const about = await answer.json();
  const networks = await load(about);
  const version = ort.env.versions.web;
  by("about").textContent =
    `Networks that classify images of ${about.dataset} (${about.size.join(" × ")} pixels), written ` +
    `by jaxprune as ONNX files and run here by onnxruntime-web ${version}: WebAssembly, one ` +
    "thread, one image at a time.";

  // What runs in a browser takes turns, too: timing ends before the next image is classified.
  let turn = Promise.resolve();
  const inTurn = (work) => (turn = turn.then(work));
  const show = async (bytes, label) => {
    const what = label === null ? "Your drawing" : `This image is labelled “${label}”`;
    by("label").textContent = `${what}. The three most likely classes, with their probabilities:`;
    const cards = [];
    for (const [i, network] of networks.entries())
      cards.push(card(network, i, await run(network, bytes, about), about.classes, label));
    by("predictions").replaceChildren(...cards);
  };
  const pick = (bytes, label) => inTurn(() => show(bytes, label)).catch(fail);
  const buttons = showSamples(about, pick);
  drawable(by("drawing"), about, pick);
  buttons[0].click();
  await turn;

  const logits = Object.fromEntries(networks.map(({ name }) => [name, []]));
  for (const network of networks)
    for (const bytes of about.images) logits[network.name].push(await run(network, bytes, about));

  const measure = () => inTurn(async () => {
    by("again").disabled = true;
    const runs = networks.map((n) => [n.name, () => run(n, about.images[0], about)]);
    const told = (round) => say(`Measuring: round ${round} of ${ROUNDS}.`);
    const times = await interleaved(Object.fromEntries(runs), ROUNDS, LENGTH, told);
    showTimes(networks, times);
    by("how").textContent = `Median of ${ROUNDS} rounds in which the networks take turns; a bar ` +
      "is milliseconds per image. What else runs on this machine makes all of them slower.";
    say(`Ready: ${networks.length} networks are loaded and measured.`);
    by("again").disabled = false;
    return times;
  });
  by("again").onclick = () => measure().catch(fail);
  const times = await measure();
  const rows = networks.map(({ name }) => [name, { ...times[name], logits: logits[name] }]);
  return {
    "onnxruntime-web": version, threads: 1, rounds: ROUNDS, "user agent": navigator.userAgent,
    networks: Object.fromEntries(rows),
  };
}

function fail(error) {
  say(`This page failed: ${error.message ?? error}`, true);
  throw error;
}

window.report = main().catch(fail); // for whoever drives this page
