// What a node client's script is made of; the same as checks.py.
import { readFileSync } from "node:fs";

const env = process.env;
export const [URL, SCRIPTED_URL] = [`${env.ACCEPTANCE_ROOT}/v1`, `${env.ACCEPTANCE_SCRIPTED}/v1`];
export const VECTORS_URL = `${env.ACCEPTANCE_VECTORS}/v1`;
export const [KEY, MODEL, IMAGE_URL] = [env.OPENAI_API_KEY, env.ACCEPTANCE_MODEL, env.ACCEPTANCE_IMAGE_URL];
export const IMAGE = readFileSync(env.ACCEPTANCE_IMAGE);
export const DATA_URI = `data:image/png;base64,${IMAGE.toString("base64")}`;
export const [QUESTION, SEEN] = ["What is at the top left?", "red circle"];
export const CITY = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] }, warm: { type: "boolean" } },
  required: ["city", "warm"],
  additionalProperties: false,
};
const LIMIT_MS = 300_000;

export const refused = (expect, check) => [check, expect];

export function city(found) {
  const value = typeof found === "string" ? JSON.parse(found) : found;
  return ["Paris", "Rome"].includes(value.city) && typeof value.warm === "boolean";
}

export const unit = (vector) => Math.abs(vector.reduce((sum, one) => sum + one * one, 0) - 1) < 1e-3;

export async function raised(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new Error("nothing was raised");
}

function cell(error) {
  for (let one = error; one; one = one.cause ?? one.lastError) {
    const status = one.status ?? one.statusCode;
    if (status) {
      const code = one.code ?? /"code":"(\w+)"/.exec(one.responseBody ?? "")?.[1];
      return code ? `${status} ${code}` : `${status}`;
    }
  }
  return error.name ?? "Error";
}

export async function run(checks) {
  const chosen = Object.entries(checks).filter(([feature]) => feature.includes(env.ACCEPTANCE_ONLY ?? ""));
  console.log(`\nCHECKS ${chosen.length}`);
  for (const [feature, one] of chosen) {
    const [check, expect] = Array.isArray(one) ? one : [one, "y"];
    let [result, detail, timer] = ["y", "", undefined];
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error(`not done after ${LIMIT_MS} ms`)), LIMIT_MS);
    });
    try {
      const value = await Promise.race([check(), late]);
      if (!value) [result, detail] = ["wrong", JSON.stringify(value)];
    } catch (error) {
      [result, detail] = [cell(error), `${error.stack ?? error}`.slice(-3000)];
    }
    clearTimeout(timer);
    console.log(`\nCELL ${JSON.stringify([feature, result, expect, detail ?? ""])}`);
  }
}
