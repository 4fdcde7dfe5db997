// Tokens: which of them make which part of a text, their shades, and their alternatives.
//
// A token is {bytes, logprob, top}: its bytes as a string of characters below 256 (null for one that
// the server gave as text with a replacement character), top: its alternatives, [[bytes, logprob], ...].
// A piece of a text is {text, tokens}: the shortest run of tokens that makes whole characters.

const utf8 = new TextEncoder();

const binary = (bytes) => String.fromCharCode(...bytes);
const bytesOf = (text) => Uint8Array.from(text, (character) => character.charCodeAt(0));

// The text of /v1/completions writes a token that is a part of a character as `bytes:\xe2\x82`.
function binaryOfText(text) {
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(text)) {
    return binary(text.match(/[0-9a-f]{2}(?=\\|$)/g).map((digits) => parseInt(digits, 16)));
  }
  return binary(utf8.encode(text));
}

const binaryOf = (entry) => (entry.bytes ? binary(entry.bytes) : binaryOfText(entry.token));
const rounded = (logprob) => Math.round(logprob * 1e4) / 1e4;

// Tokens of a choice's `logprobs`, in the format of either endpoint.
export function tokensOf(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map((entry) => ({
      bytes: binaryOf(entry),
      logprob: rounded(entry.logprob),
      top: (entry.top_logprobs ?? []).map((other) => [binaryOf(other), rounded(other.logprob)]),
    }));
  }
  return (logprobs?.tokens ?? []).map((token, i) => ({
    bytes: binaryOfText(token),
    logprob: rounded(logprobs.token_logprobs[i] ?? 0),
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([text, logprob]) => [
      binaryOfText(text),
      rounded(logprob),
    ]),
  }));
}

// Cuts a growing text into pieces. The text is the server's: tokens only say where it is cut, since
// some of them are not in it (special tokens), and a stop string may end it inside one.
export class Pieces {
  decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  text = ''; // not yet in a piece
  queue = []; // pieces that the tokens would make, not yet found in the text
  open = []; // tokens whose character is not complete
  lost = []; // tokens that were not found in the text

  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      const decoded = this.decoder.decode(bytesOf(token.bytes), { stream: true });
      this.open.push(token);
      if (decoded) {
        this.queue.push({ text: decoded, tokens: this.open });
        this.open = [];
      }
    }
    return this.cut();
  }

  cut() {
    const pieces = [];
    const take = (length, tokens) => {
      pieces.push({ text: this.text.slice(0, length), tokens });
      this.text = this.text.slice(length);
    };
    while (this.text && this.queue.length) {
      const { text, tokens } = this.queue[0];
      if (this.text.startsWith(text)) {
        take(text.length, tokens);
        this.lost = [];
      } else if (text.startsWith(this.text)) {
        break; // the rest of this token's text is still to come
      } else {
        // What stands before the next token's text is that of those which were not found.
        const at = this.lost.length ? this.text.slice(0, 64).indexOf(text) : -1;
        if (at > 0) {
          take(at, this.lost);
          this.lost = [];
          continue;
        }
        this.lost.push(...tokens);
      }
      this.queue.shift();
    }
    if (this.text && !this.queue.length) {
      take(this.text.length, this.lost);
      this.lost = [];
    }
    return pieces;
  }

  // The end of a text that a stop string cut inside a token.
  end() {
    if (!this.text) return [];
    const piece = { text: this.text, tokens: this.queue[0]?.tokens ?? [] };
    this.text = '';
    return [piece];
  }
}

// A token as it can be read in a list: with visible spaces, parts of characters as hexadecimal.
export function visible(bytes) {
  try {
    const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytesOf(bytes));
    return text.replace(/ /g, '␣').replace(/\n/g, '↵').replace(/\t/g, '⇥').replace(/\r/g, '␍') || '(empty)';
  } catch {
    return [...bytesOf(bytes)].map((byte) => '0x' + byte.toString(16).toUpperCase().padStart(2, '0')).join(' ');
  }
}

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value > 0 && value < 0.1) return '< 0.1%';
  return `${value.toFixed(1)}%`;
}

function shade(tokens) {
  const probability = Math.exp(Math.min(...tokens.map((token) => token.logprob)));
  return ['p0', 'p1', 'p2', 'p3', 'p4'][[0.9, 0.75, 0.5, 0.25].filter((bound) => probability <= bound).length];
}

const pieceOf = new WeakMap(); // of a token's element

// Shows a text that grows by pieces. Text of the model only ever becomes text nodes.
// Lines go into blocks of their own, so that a long text is laid out once and not with every token.
export class TokenText {
  constructor(element, shades) {
    this.element = element;
    this.shades = shades;
    this.spanOf = new Map(); // the elements of the pieces with tokens
    element.classList.add('tokens');
  }

  add(pieces) {
    for (const piece of pieces) {
      if (!this.block || (this.block.length > 400 && this.block.ended)) {
        this.block = { element: this.element.appendChild(document.createElement('div')), length: 0 };
      }
      this.block.length += piece.text.length;
      this.block.ended = piece.text.endsWith('\n');
      if (this.shades && piece.tokens.length) this.block.element.append(this.span(piece));
      else this.plain(piece.text);
    }
  }

  span(piece) {
    const span = document.createElement('span');
    span.textContent = piece.text;
    span.className = shade(piece.tokens);
    span.tabIndex = this.spanOf.size ? -1 : 0;
    if (!this.spanOf.size) {
      this.element.setAttribute('role', 'group');
      this.element.setAttribute('aria-label', 'Tokens; the arrow keys go through them');
    }
    pieceOf.set(span, piece);
    this.spanOf.set(piece, span);
    return span;
  }

  plain(text) {
    const last = this.block.element.lastChild;
    if (last instanceof Text) last.appendData(text);
    else this.block.element.append(text);
  }
}

const tip = document.getElementById('alternatives');
let shown = null; // the token's element whose alternatives are shown
let hiding;

function row(bytes, logprob, chosen) {
  const line = document.createElement('tr');
  const name = line.insertCell();
  name.textContent = visible(bytes);
  const bar = document.createElement('span');
  bar.className = 'bar';
  bar.appendChild(document.createElement('span')).style.width = percent(logprob).replace('< ', '');
  line.insertCell().append(bar);
  line.insertCell().textContent = percent(logprob);
  if (chosen) {
    line.className = 'chosen';
    name.append(Object.assign(document.createElement('span'), { className: 'unseen', textContent: ' (chosen)' }));
  }
  return line;
}

function show(span) {
  clearTimeout(hiding);
  if (shown === span) return;
  hide();
  shown = span;
  tip.replaceChildren(
    ...pieceOf.get(span).tokens.map((token) => {
      const table = document.createElement('table');
      if (!token.top.some(([bytes]) => bytes === token.bytes)) table.append(row(token.bytes, token.logprob, true));
      for (const [bytes, logprob] of token.top) table.append(row(bytes, logprob, bytes === token.bytes));
      return table;
    }),
  );
  span.setAttribute('aria-describedby', tip.id);
  span.classList.add('pointed');
  tip.hidden = false;
  // A token with a line break within has two rectangles: the wider one counts.
  const place = [...span.getClientRects()].reduce((a, b) => (b.width > a.width ? b : a));
  const { width, height } = tip.getBoundingClientRect();
  const below = place.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, document.documentElement.clientWidth - width - 8))}px`;
  tip.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - height - 6)}px`;
}

export function hide() {
  clearTimeout(hiding);
  if (!shown) return false;
  shown.removeAttribute('aria-describedby');
  shown.classList.remove('pointed');
  shown = null;
  tip.hidden = true;
  return true;
}

const tokenAt = (target) => (pieceOf.has(target) ? target : null);

function neighbour(span, key) {
  const spans = [...span.closest('.tokens').querySelectorAll('.tokens > div > span')];
  const at = spans.indexOf(span);
  return { ArrowRight: spans[at + 1], ArrowLeft: spans[at - 1], Home: spans[0], End: spans.at(-1) }[key];
}

// The pointer may go to the alternatives without hiding them.
document.addEventListener('pointerover', (event) => {
  const span = tokenAt(event.target);
  if (span) show(span);
  else if (tip.contains(event.target)) clearTimeout(hiding);
  else if (shown && shown !== document.activeElement) hiding = setTimeout(hide, 200);
});
document.addEventListener('focusin', (event) => {
  const span = tokenAt(event.target);
  if (!span) return void hide();
  span.closest('.tokens').querySelector('[tabindex="0"]').tabIndex = -1;
  span.tabIndex = 0;
  span.scrollIntoView({ block: 'nearest' });
  show(span);
});
document.addEventListener('focusout', hide);
document.addEventListener('scroll', () => shown !== document.activeElement && hide(), true);
document.addEventListener('keydown', (event) => {
  const next = tokenAt(event.target) && neighbour(event.target, event.key);
  if (!next) return;
  event.preventDefault();
  next.focus();
});
