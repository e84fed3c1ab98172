// OpenAI's own client for node.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CITY, DATA_URI, IMAGE_URL, MODEL, QUESTION, SCRIPTED_URL, SEEN, VECTORS_URL, city, raised, refused, run, unit } from "./checks.mjs";

const client = new OpenAI({ maxRetries: 0 });
const script = new OpenAI({ maxRetries: 0, baseURL: SCRIPTED_URL });
const City = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() });
const tools = [{ type: "function", function: { name: "weather", parameters: CITY } }];
const newTools = [{ type: "function", name: "weather", parameters: CITY, strict: true }];
const response_format = { type: "json_schema", json_schema: { name: "city", schema: CITY, strict: true } };
const user = (content = QUESTION) => [{ role: "user", content }];
const look = (url) => user([{ type: "image_url", image_url: { url } }, { type: "text", text: QUESTION }]);
const seen = user([{ type: "input_image", image_url: DATA_URI, detail: "auto" }, { type: "input_text", text: QUESTION }]);
const ask = (fields = {}, api = client) =>
  api.chat.completions.create({ model: MODEL, messages: user(), max_tokens: 1024, temperature: 0, ...fields });
const message = async (...asked) => (await ask(...asked)).choices[0].message;
const called = async (...asked) => city((await message(...asked)).tool_calls[0].function.arguments);
const respond = (fields) => client.responses.create({ model: MODEL, input: QUESTION, ...fields });

async function chunks(...asked) {
  const found = [];
  for await (const chunk of await ask(...asked)) found.push(chunk);
  return found;
}

async function quickStart() {
  const client = new OpenAI({ apiKey: process.env["OPENAI_API_KEY"] });
  const response = await client.responses.create({
    model: "gpt-5.5",
    instructions: "You are a coding assistant that talks like a pirate",
    input: "Are semicolons optional in JavaScript?",
  });
  const completion = await client.chat.completions.create({
    model: "gpt-5.5",
    messages: [
      { role: "developer", content: "Talk like a pirate." },
      { role: "user", content: "Are semicolons optional in JavaScript?" },
    ],
  });
  return ["completed", "incomplete"].includes(response.status) && typeof completion.choices[0].message.content === "string";
}

async function loop() {
  let asked = 0;
  const weather = { name: "weather", parameters: CITY, parse: JSON.parse, function: () => `sunny ${++asked}` };
  const given = { model: MODEL, messages: user(), tools: [{ type: "function", function: weather }] };
  return (await script.chat.completions.runTools(given).finalContent()) === SEEN && asked === 1;
}

async function cancelled() {
  // 32 streams, twice as many as the server has places
  const abort = new AbortController();
  const body = { model: MODEL, messages: user(), max_tokens: 1000, ignore_eos: true, stream: true };
  const begin = () => client.chat.completions.create(body, { signal: abort.signal });
  const streams = [...Array(32)].map(begin);
  for await (const _ of await streams[0]) break;
  abort.abort();
  await Promise.allSettled(streams);
  const began = Date.now();
  await ask({ max_tokens: 1 });
  return Date.now() - began < 2000;
}

async function errors() {
  const error = await raised(ask({ temperature: -1 }));
  return error instanceof OpenAI.BadRequestError && error.param === "temperature" && error.requestID;
}

await run({
  "quick start": quickStart,
  "list of models": async () => (await client.models.list()).data.some((model) => model.id === MODEL),
  "one model": async () => (await client.models.retrieve(MODEL)).id === MODEL,
  "chat": async () => (await message()).content,
  "chat, streamed": async () =>
    (await chunks({ stream: true })).map((one) => one.choices[0].delta.content ?? "").join("") ===
    (await message()).content,
  "usage in a stream": async () => (await chunks({ stream: true, stream_options: { include_usage: true } })).at(-1).usage,
  "image sent along": async () => (await message({ messages: look(DATA_URI) })).content === SEEN,
  "image by http: URL (s)": async () => (await ask({ messages: look(IMAGE_URL) }, script)).usage.prompt_tokens > 30,
  "tools offered": async () => (await message({ tools })).content,
  "tool call (s)": () => called({ tools }, script),
  "two calls (s)": async () => (await message({ tools, messages: user("both?") }, script)).tool_calls.length === 2,
  "call, streamed (s)": async () => {
    const stream = script.chat.completions.stream({ model: MODEL, messages: user(), tools });
    return city((await stream.finalChatCompletion()).choices[0].message.tool_calls[0].function.arguments);
  },
  "tool loop (s)": loop,
  "tool_choice: required": () => called({ tools, tool_choice: "required", parallel_tool_calls: false }),
  "tool_choice: by name": () => called({ tools, tool_choice: { type: "function", function: { name: "weather" } } }),
  "json_schema": async () => city((await message({ response_format })).content),
  "typed answer": async () => {
    const given = { model: MODEL, messages: user(), response_format: zodResponseFormat(City, "city") };
    return city((await client.chat.completions.parse(given)).choices[0].message.parsed);
  },
  "reasoning, streamed (s)": async () =>
    (await chunks({ stream: true, messages: user("think") }, script))
      .map((one) => one.choices[0].delta.reasoning_content ?? "").join("") === "I look.",
  "log probabilities": async () =>
    (await ask({ logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content
      .map((one) => one.top_logprobs.length).every((count, _, all) => all.length > 1 && count === 2),
  "n = 2": async () => (await ask({ n: 2, temperature: 1 })).choices.length === 2,
  "completions": async () =>
    (await client.completions.create({ model: MODEL, prompt: "a red", max_tokens: 3 })).choices[0].text,
  "responses": async () => (await respond({ input: seen })).output_text === SEEN,
  "responses, streamed": async () =>
    (await client.responses.stream({ model: MODEL, input: QUESTION }).finalResponse()).output_text,
  "responses: tools": async () => city((await respond({ tools: newTools, tool_choice: "required" })).output[0].arguments),
  "responses: typed answer": async () => {
    const text = { format: zodTextFormat(City, "city") };
    return city((await client.responses.parse({ model: MODEL, input: QUESTION, text })).output_parsed);
  },
  "embeddings (e)": async () =>
    (await client.withOptions({ baseURL: VECTORS_URL }).embeddings.create({ model: MODEL, input: ["a", "b"] }))
      .data.map((one) => unit(one.embedding)).join() === "true,true",
  "an error's class, code and place": errors,
  "wrong key": refused("401 invalid_api_key", () => ask({}, client.withOptions({ apiKey: "sk-other" }))),
  "32 at once": async () =>
    (await Promise.all([...Array(32).keys()].map((i) => ask({ messages: user(`${i}?`), max_tokens: 8 })))).length === 32,
  "cancelled": cancelled,
});
