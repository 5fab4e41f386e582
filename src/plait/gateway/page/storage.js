// What the browser remembers; where it may not (private windows, blocked cookies), nothing is remembered.

export function recall(area, name) {
  try {
    return window[area].getItem(name);
  } catch {
    return null;
  }
}

export function remember(area, name, value) {
  try {
    if (value === null) window[area].removeItem(name);
    else window[area].setItem(name, value);
  } catch {
    // The value lives on in this page only.
  }
}
