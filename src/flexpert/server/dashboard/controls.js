// Changes that are asked for from the page: each is shown before it begins.

import { ask, key, Refused } from "./connection.js";
import { bytes, count, ids } from "./format.js";

const by = (id) => document.getElementById(id);

function facts(preview) {
  const found = [];
  const add = (name, value) => found.push([name, value]);
  if (preview.add.length) add("Join", ids(preview.add));
  if (preview.remove.length) add("Leave", ids(preview.remove));
  add("Ranks after it", `${preview.target.length} (${ids(preview.target)})`);
  if (preview.moved_experts) {
    add("Experts to load", `${count(preview.moved_experts)}, ${bytes(preview.moved_bytes)}`);
    const shares = Object.entries(preview.experts_to_load);
    const most = shares.reduce((best, one) => (one[1] > best[1] ? one : best));
    add("Most of them", `rank ${most[0]}: ${count(most[1])}`);
  }
  if (preview.remove.length) add("Requests to move", count(preview.moved_requests));
  return found;
}

function fill(place, rows) {
  place.replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
}

export class Controls {
  constructor(onKey) {
    this.onKey = onKey;
  }

  // Until the user has given a key. why: what was wrong with the one before.
  askKey(why) {
    const dialog = by("ask");
    by("ask-error").hidden = !why;
    by("ask-error").textContent = why ?? "";
    if (dialog.open) return;
    by("key").value = "";
    dialog.showModal();
    dialog.onclose = () => {
      const given = by("key").value.trim();
      by("key").value = "";
      if (given) key.set(given);
      this.onKey();
    };
  }

  // title: what it is. body: of POST cluster/operations.
  async change(title, body) {
    const dialog = by("preview");
    const [go, error] = [by("preview-go"), by("preview-error")];
    by("preview-title").textContent = title;
    fill(by("preview-facts"), []);
    error.hidden = true;
    go.disabled = true;
    go.hidden = false;
    go.textContent = "Begin";
    let nothing = false;
    try {
      const preview = await ask("POST", "cluster/operations", { ...body, dry_run: true });
      nothing = !preview.add.length && !preview.remove.length && !preview.moved_experts;
      fill(by("preview-facts"), nothing ? [["", "Nothing to change: the ranks are these already."]] : facts(preview));
    } catch (refused) {
      this.tell(error, refused);
      nothing = true;
    }
    go.disabled = nothing;
    go.hidden = nothing;
    return this.confirmed(dialog, () => ask("POST", "cluster/operations", body));
  }

  async cancel(operation) {
    by("preview-title").textContent = "Cancel this change";
    by("preview-error").hidden = true;
    const go = by("preview-go");
    go.disabled = go.hidden = false;
    go.textContent = "Cancel the change";
    fill(by("preview-facts"), [["Change", operation.id], ["Phase", operation.phase], ["After it", "the service is as it was before"]]);
    return this.confirmed(by("preview"), () => ask("DELETE", `cluster/operations/${encodeURIComponent(operation.id)}`));
  }

  // Whether it was begun.
  async confirmed(dialog, act) {
    dialog.returnValue = "no";
    dialog.showModal();
    await new Promise((done) => { dialog.onclose = done; });
    if (dialog.returnValue !== "yes") return false;
    try {
      await act();
      return true;
    } catch (refused) {
      by("preview-go").hidden = true;
      this.tell(by("preview-error"), refused);
      dialog.showModal();
      return false;
    }
  }

  tell(place, refused) {
    if (refused instanceof Refused && refused.status === 401) {
      key.forget();
      this.askKey(refused.message);
    }
    place.textContent = refused.message;
    place.hidden = false;
  }
}
