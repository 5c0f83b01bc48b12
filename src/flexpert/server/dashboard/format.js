// Numbers and changes as people read them (pure).

export const count = (value) => value.toLocaleString("en-US");

export function figure(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 100) return count(Math.round(value));
  return value >= 10 ? value.toFixed(1) : value.toFixed(value >= 1 ? 2 : value === 0 ? 0 : 3);
}

export function bytes(size) {
  if (!size) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (size >= 1024 && step < units.length - 1) { size /= 1024; step += 1; }
  return `${size >= 100 || step === 0 ? Math.round(size) : size.toFixed(1)} ${units[step]}`;
}

export function seconds(value) {
  if (value < 0.001) return "0 ms";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export const clock = (time) =>
  new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

export const minute = (time) =>
  new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });

// [0, 1, 2, 5] → "0–2, 5"
export function ids(list) {
  const parts = [];
  for (let at = 0; at < list.length; at += 1) {
    let end = at;
    while (end + 1 < list.length && list[end + 1] === list[end] + 1) end += 1;
    parts.push(end > at + 1 ? `${list[at]}–${list[end]}` : list.slice(at, end + 1).join(", "));
    at = end;
  }
  return parts.join(", ");
}

const ranks = (list) => `rank${list.length === 1 ? "" : "s"} ${ids(list)}`;

export function change(operation) {
  const parts = [];
  if (operation.add.length) parts.push(`${ranks(operation.add)} join${operation.add.length === 1 ? "s" : ""}`);
  if (operation.remove.length) parts.push(`${ranks(operation.remove)} leave${operation.remove.length === 1 ? "s" : ""}`);
  if (!parts.length) return operation.moved_experts ? "Experts move" : "Nothing to change";
  const text = parts.join(", ");
  return text[0].toUpperCase() + text.slice(1);
}
