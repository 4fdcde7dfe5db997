// What the engine does, every two seconds while the page is visible.

import { element } from './answer.js';
import { stats } from './server.js';

const SECONDS = 2;
const place = document.getElementById('figures');
const time = () => new Date().toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit' });

let before = null; // {at, models}
let gone = null; // when the server stopped answering

function pages({ used_pages: used, cached_pages: cached, total_pages: total }) {
  const text = `${used} used, ${cached} cached of ${total} pages`;
  const bar = element('span', { className: 'bar' });
  for (const [name, count] of [['used', used], ['cached', cached]]) {
    if (!count) continue;
    const part = element('span', { className: name });
    part.style.width = `${(100 * count) / (total || 1)}%`;
    bar.append(part);
  }
  bar.setAttribute('aria-hidden', 'true');
  return element('span', { className: 'pages' }, bar, text);
}

function line(id, now, rate) {
  const where = [now.executor, now.device].filter(Boolean).join(' on ');
  const figures = [
    `${now.num_running} running`,
    `${now.num_waiting} waiting`,
    rate === null ? '' : `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
  ];
  const made = element('p', { className: 'small' }, element('strong', { textContent: id }));
  made.append(element('span', { className: 'where', textContent: where }));
  for (const text of figures) if (text) made.append(element('span', { textContent: text }));
  made.append(pages(now));
  return made;
}

// `shown` tells the models whose figures are shown; `back` is called when the server answers again.
export function watch(shown, back) {
  async function look() {
    if (document.hidden) return;
    let models;
    try {
      models = await stats();
    } catch (error) {
      before = null;
      if (error.status) {
        place.replaceChildren(element('p', { className: 'small', textContent: error.status === 401 ? '' : error.message }));
        return;
      }
      if (gone) return;
      gone = time();
      const text = `The server has not answered since ${gone}. The page goes on trying.`;
      place.replaceChildren(element('p', { className: 'small gone', role: 'alert', textContent: text }));
      return;
    }
    if (gone) {
      gone = null;
      back();
    }
    const now = { at: performance.now(), models };
    const lines = [...new Set(shown())].filter((id) => models[id]).map((id) => {
      const earlier = before?.models[id];
      const grown = earlier && models[id].num_new_tokens - earlier.num_new_tokens;
      return line(id, models[id], earlier && grown >= 0 ? (1000 * grown) / (now.at - before.at) : null);
    });
    place.replaceChildren(...lines);
    before = now;
  }
  async function loop() {
    await look();
    setTimeout(loop, 1000 * SECONDS);
  }
  document.addEventListener('visibilitychange', () => (before = null));
  loop();
  return look;
}
