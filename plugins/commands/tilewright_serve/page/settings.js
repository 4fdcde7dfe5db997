// What the person chose: kept in localStorage, and as fields of a request's body.

const KEY = 'tilewright-settings';
const NUMBERS = ['temperature', 'top_p', 'top_k', 'seed', 'max_tokens'];

export function kept(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export const settings = { probabilities: true, ...kept(KEY, {}) };

// False where the browser keeps nothing, or not so much.
export function store(key, value, replacer) {
  try {
    localStorage.setItem(key, JSON.stringify(value, replacer));
    return true;
  } catch {
    return false;
  }
}

export const keep = () => store(KEY, settings);

// Fields of a body; those left empty are not sent.
export function fields(values, chat, probabilities = settings.probabilities) {
  const body = {};
  for (const name of NUMBERS) if (Number.isFinite(values[name])) body[name] = values[name];
  if (chat) body.separate_reasoning = true;
  if (chat && values.thinking) body.chat_template_kwargs = { enable_thinking: values.thinking === 'on' };
  if (probabilities) Object.assign(body, chat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
  return body;
}

export function chatMessages(values, messages) {
  return values.system ? [{ role: 'system', content: values.system }, ...messages] : messages;
}

// Fills a form from `values`, and keeps what is entered there; `changed` is called with a field's name.
export function bind(form, values, changed) {
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === 'checkbox') field.checked = Boolean(values[field.name]);
    else field.value = values[field.name] ?? '';
    field.addEventListener('input', () => {
      if (field.type === 'checkbox') values[field.name] = field.checked;
      else if (field.type === 'number') values[field.name] = field.value === '' ? null : field.valueAsNumber;
      else values[field.name] = field.value;
      changed(field.name);
    });
  }
  form.addEventListener('submit', (event) => event.preventDefault());
}
