// Numbers as people read them.

export function formatMs(ms) {
  if (ms < 10) return `${ms.toFixed(ms < 0.1 ? 3 : 1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

export function formatSpeed(tokensPerS) {
  return tokensPerS < 100 ? tokensPerS.toFixed(1) : String(Math.round(tokensPerS));
}

export function formatBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = bytes < 1 ? 0 : Math.min(Math.floor(Math.log2(bytes) / 10), units.length - 1);
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

// What a loading server or machine does, as /status and /swarm/status say it.
export function formatLoading({ stage, done_bytes: done, total_bytes: total }) {
  const name = stage.charAt(0).toUpperCase() + stage.slice(1);
  return total ? `${name}: ${formatBytes(done)} of ${formatBytes(total)}` : `${name}…`;
}
