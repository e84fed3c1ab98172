// The AI SDK: chats by @ai-sdk/openai-compatible, responses by @ai-sdk/openai.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embed, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { IMAGE, KEY, MODEL, QUESTION, SCRIPTED_URL, SEEN, URL, VECTORS_URL, city, raised, run, unit } from "./checks.mjs";

const options = { name: "here", apiKey: KEY, includeUsage: true, supportsStructuredOutputs: true };
const here = createOpenAICompatible({ ...options, baseURL: URL });
const model = here.chatModel(MODEL);
const script = createOpenAICompatible({ ...options, baseURL: SCRIPTED_URL }).chatModel(MODEL);
const plain = createOpenAICompatible({ baseURL: SCRIPTED_URL, name: "plain", apiKey: KEY }).chatModel(MODEL);
const vectors = createOpenAICompatible({ ...options, baseURL: VECTORS_URL });
const response = createOpenAI({ baseURL: URL, apiKey: KEY })(MODEL);
const schema = z.object({ city: z.enum(["Paris", "Rome"]), warm: z.boolean() });
const answered = { weather: tool({ description: "The weather", inputSchema: schema, execute: async () => "sunny" }) };
const tools = { weather: tool({ description: "The weather", inputSchema: schema }) };
const seen = [{ role: "user", content: [{ type: "image", image: IMAGE }, { type: "text", text: QUESTION }] }];
const given = { maxRetries: 0, maxOutputTokens: 1024, model, prompt: QUESTION };
const byResponse = { maxRetries: 0, model: response, prompt: QUESTION };
const look = { prompt: undefined, messages: seen };

const ask = (fields = {}) => generateText({ temperature: 0, ...given, ...fields });
const respond = (fields = {}) => generateText({ ...byResponse, ...fields });

async function streamed(fields = {}) {
  const result = streamText({ ...given, ...fields });
  await result.consumeStream();
  const [text, reasoning, calls, usage] = await Promise.all([
    result.text, result.reasoningText, result.toolCalls, result.usage,
  ]);
  return { text, reasoning, calls, usage };
}

async function loop() {
  const { steps, text } = await ask({ model: script, tools: answered, stopWhen: stepCountIs(3) });
  return steps.length === 2 && text === SEEN;
}

async function typed() {
  const { object } = await generateObject({ ...given, schema });
  const streamed = streamObject({ ...given, schema });
  for await (const _ of streamed.partialObjectStream); // nothing comes unless it is read
  return city(object) && city(await streamed.object);
}

async function quickStart() {
  const { text } = await generateText({
    model: createOpenAICompatible({
      baseURL: URL,
      name: "example",
      apiKey: process.env.OPENAI_API_KEY,
    }).chatModel("tiny"),
    prompt: "Write a vegetarian lasagna recipe for 4 people.",
  });
  return text;
}

await run({
  "quick start": quickStart,
  "chat": async () => (await ask()).text,
  "chat, streamed": async () => (await streamed({ temperature: 0 })).text === (await ask()).text,
  "usage in a stream": async () => (await streamed()).usage.totalTokens > 0,
  "image sent along": async () => (await ask(look)).text === SEEN,
  "tools offered": async () => (await ask({ tools })).text,
  "tool call (s)": async () => city((await ask({ model: script, tools })).toolCalls[0].input),
  "two calls (s)": async () => (await ask({ model: script, prompt: "both?", tools })).toolCalls.length === 2,
  "call, streamed (s)": async () => city((await streamed({ model: script, tools })).calls[0].input),
  "tool loop (s)": loop,
  "tool_choice: required": async () => city((await ask({ tools, toolChoice: "required" })).toolCalls[0].input),
  "tool_choice: by name": async () =>
    city((await ask({ tools, toolChoice: { type: "tool", toolName: "weather" } })).toolCalls[0].input),
  "json_schema": async () => city((await ask({ output: Output.object({ schema }) })).output),
  "typed answer": typed,
  "typed answer by the prompt (s)": async () =>
    city((await generateObject({ ...given, model: plain, schema })).object),
  "reasoning (s)": async () => (await ask({ model: script, prompt: "think" })).reasoningText === "I look.",
  "reasoning, streamed (s)": async () => (await streamed({ model: script, prompt: "think" })).reasoning === "I look.",
  "completions": async () => (await ask({ model: here.completionModel(MODEL), prompt: "a red" })).text,
  "responses": async () => (await respond(look)).text === SEEN,
  "responses, streamed": async () => (await streamed(byResponse)).text,
  "responses: tools": async () => city((await respond({ tools, toolChoice: "required" })).toolCalls[0].input),
  "responses: typed answer": async () => city((await generateObject({ ...byResponse, schema })).object),
  "embeddings (e)": async () =>
    unit((await embed({ maxRetries: 0, model: vectors.embeddingModel(MODEL), value: "a" })).embedding),
  "an error's class, code and place": async () =>
    (await raised(ask({ temperature: -1 }))).data.error.param === "temperature",
});
