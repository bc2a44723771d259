// Times of several functions that take turns, so that slow moments of the machine hit all of them.

export function quantile(values, q) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = q * (sorted.length - 1), low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (at - low) * (sorted[high] - sorted[low]);
}

const pause = () => new Promise((done) => setTimeout(done, 0));

/** Milliseconds of one call, over so many calls in a row. */
async function sample(run, calls) {
  const begin = performance.now();
  for (let i = 0; i < calls; i++) await run();
  return (performance.now() - begin) / calls;
}

/**
 * Times functions in rounds, each round in another order.
 * A browser's clock ticks every 0.1 ms, so that a sample is as many calls as take about `length` ms.
 * Returns by name the median and the quartiles in ms, and the median over rounds of how many times
 * faster it was than the first one.
 */
export async function interleaved(runs, rounds, length, progress) {
  const names = Object.keys(runs), calls = {}, times = {};
  for (const name of names) {
    await sample(runs[name], 3); // the first calls are slower
    calls[name] = Math.max(1, Math.ceil(length / (await sample(runs[name], 5))));
    times[name] = [];
  }
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < names.length; i++) {
      const name = names[(i + round) % names.length];
      times[name].push(await sample(runs[name], calls[name]));
    }
    progress(round + 1);
    await pause();
  }
  const summary = (name) => ({
    milliseconds: quantile(times[name], 0.5),
    quartiles: [quantile(times[name], 0.25), quantile(times[name], 0.75)],
    "speedup over the first": quantile(times[name].map((t, i) => times[names[0]][i] / t), 0.5),
    calls: calls[name],
  });
  return Object.fromEntries(names.map((name) => [name, summary(name)]));
}
