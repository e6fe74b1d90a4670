/** Why something failed; docs/javascript.md explains each. */
export type Code =
  | "missing"
  | "damaged"
  | "schema"
  | "tokenizer"
  | "template"
  | "runtime"
  | "memory"
  | "option"
  | "input"
  | "too-large"
  | "no-winner";

export const CODES: readonly Code[];

/** Every error that the module raises on purpose. An abort rejects with the signal's reason instead, as `fetch` does. */
export class BonnxError extends Error {
  constructor(code: Code, message: string, options?: ErrorOptions);
  readonly code: Code;
}

/** How much has come of the files that were asked for so far, in bytes. */
export interface Progress {
  /** The file of which a piece has come, relative to the artifact. */
  file: string;
  loaded: number;
  total: number;
}

export interface LoadOptions {
  /** The module of onnxruntime-web or onnxruntime-node; by default the one that is installed, in Node onnxruntime-node first. */
  runtime?: object;
  /** As ONNX Runtime takes them; by default `["cpu"]` in onnxruntime-node and `["wasm"]` in onnxruntime-web. */
  executionProviders?: readonly (string | object)[];
  /** Threads of one run. In onnxruntime-web they are those of the page, set before its first session, and need isolation. */
  threads?: number;
  /** Graphs to open at once; by default `rank`, or `generate` where there is no scorer. Others are opened on first use. */
  graphs?: readonly string[];
  /** Called with every piece of a file that comes. */
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
}

export interface TextPart {
  type: "text";
  text: string;
}

/** Other keys than these go to the chat template, too. */
export interface Message {
  role: string;
  content?: string | readonly TextPart[] | null;
  [key: string]: unknown;
}

/** Token ids. */
export type Ids = readonly number[] | Int32Array | BigInt64Array;
/** (length, embed_dim), for artifacts of the kind `network`. */
export type Embeddings = readonly (readonly number[] | Float32Array)[];
export type Prompt = string | readonly Message[] | Ids | Embeddings;
/** A text continues the prompt, or answers the messages as the assistant; a list of texts is a candidate in steps. */
export type Candidate = string | readonly string[] | readonly Message[] | Ids | Embeddings;

export type Rule = "last" | "mean" | "min" | "max" | "prod";
/** How the scores of a candidate's tokens become one; `step_` in front reads only the ends of steps. */
export type Aggregation = Rule | `step_${Rule}`;
export type Vote = "score" | "weighted" | "majority";
/** What a candidate votes for. */
export type Answer = string | number | bigint | boolean | null | undefined;
/** How to find a candidate's answer: the last box, number or match of its text, the tools that it calls, or a function. */
export type FindAnswer<T> =
  "boxed" | "number" | `regex:${string}` | "tool" | `tool-except:${string}` | RegExp | ((candidate: T) => Answer);

export interface RankOptions {
  /** By default the artifact's own rule. */
  aggregation?: Aggregation | null;
  /** For each candidate 0 or 1 for each token, 1 where a step ends; only for the `step_` aggregations. */
  stepMasks?: readonly (readonly (0 | 1 | boolean)[])[] | null;
  /** Text candidates are not finished: no end token is appended, and no template closes the answer. Default: false. */
  partial?: boolean;
  /** Drop the beginning of a prompt that is too long instead of failing. Default: false. */
  truncate?: boolean;
  /** Of a reranker: what makes a document relevant; by default the model's own. */
  instruction?: string | null;
  /** Default: `score`. */
  vote?: Vote;
  /** One answer for each candidate, or how to find them. Needed to vote. */
  answers?: readonly Answer[] | FindAnswer<any> | null;
  /** Checked before and after the run, which it does not interrupt. */
  signal?: AbortSignal;
}

export interface Ranking<T = Candidate> {
  /** Index of the winner; ties go to the lowest. */
  bestIndex: number;
  /** The winner, as it was passed. */
  best: T;
  /** NaN for a candidate that cannot win. */
  candidateScores: number[];
  /** For each candidate one score for each of its tokens. */
  scores: number[][];
  aggregation: Aggregation;
  /** Indices, best first; those that cannot win come last. */
  order: number[];
  /** The lead of the winner over the next candidate or answer; null if there is no other. */
  margin: number | null;
  /** What each candidate votes for, null for none; null if no answers were given. */
  answers: Answer[] | null;
  /** With a vote: the sum of weights or the number of the candidates of each candidate's answer, NaN where it cannot win. */
  groupScores: number[] | null;
  /** For each candidate its scores where a step ends; null unless the aggregation reads steps. */
  stepScores: number[][] | null;
  /** Tokens dropped from the beginning of the prompt. */
  cut: number;
  /** For each candidate that could not be read its index and why. */
  unreadable: Record<number, string>;
  /** Of a model whose score is weighted by a gate: what it weighs, by name and candidate. */
  objectives: Record<string, number[]> | null;
}

export interface GenerateOptions {
  /** Number of candidates; the first 8 of 16 are those of 8. Default: 1. */
  n?: number;
  /** By default what the artifact's limit leaves. */
  maxNewTokens?: number | null;
  /** Divides the logits; 0, and anything below 1e-5, takes the most likely token. Default: 1. */
  temperature?: number;
  /** Draw from the k most likely tokens; 0 draws from all. Default: 0. */
  topK?: number;
  /** Of these, draw from the smallest set of most likely tokens with this probability. Default: 1. */
  topP?: number;
  /** The same seed gives the same tokens in every runtime: a whole number, as a BigInt beyond 2^53. Default: 0. */
  seed?: number | bigint;
  /** What ends a completion: texts, which its text then ends before, and token ids; by default the artifact's own tokens. */
  stop?: readonly (string | number)[] | null;
  aggregation?: Aggregation | null;
  /** Tokens after which only the best candidates are kept; 0 is never. Default: 0. */
  pruneEvery?: number;
  /** The share of candidates that a pruning keeps, rounded up. Default: 0.5. */
  pruneKeep?: number;
  /** Default: `score`. */
  vote?: Vote;
  /** How to find what a candidate votes for in its text (in its token ids where there is no tokenizer). Needed to vote. */
  answers?: FindAnswer<any> | null;
  /** In seconds; candidates unfinished by then are cut, with the finish reason `deadline`. */
  deadline?: number;
  /** Called with the candidates after every token, and awaited: return a promise to slow down. */
  onToken?: (state: Generation) => unknown;
  /** Stops the generation after the present token. */
  signal?: AbortSignal;
}

export interface GeneratedCandidate {
  /** What it adds to the prompt's text, without special tokens; null if the artifact has no tokenizer. */
  text: string | null;
  tokens: number[];
  /** The score at each token. */
  scores: number[];
  /** Of each token under the model itself (temperature 1, unfiltered), in nats. */
  logProbs: number[];
  /** NaN for a candidate that cannot win. */
  score: number;
  /** Null while it grows. */
  finishReason: "length" | "stop" | "pruned" | "deadline" | null;
}

export interface Generation {
  /** Index of the winner; -1 while nothing can win. */
  bestIndex: number;
  /** The winner; null while nothing can win. */
  readonly best: GeneratedCandidate | null;
  candidates: GeneratedCandidate[];
  promptTokens: number;
  /** Tokens that the network read for all candidates together, without the prompt. */
  computedTokens: number;
  aggregation: Aggregation;
  answers: Answer[] | null;
  groupScores: number[] | null;
}

/** The result of `generate`, which has a winner. */
export interface FinishedGeneration extends Generation {
  readonly best: GeneratedCandidate;
}

/** An open artifact. Each graph is opened on first use; calls wait for one another. */
export class Model {
  private constructor();
  /** The contents of manifest.json. */
  readonly manifest: Readonly<Record<string, any>>;
  /** Where the graphs run. */
  readonly executionProviders: (string | object)[];
  /** Score candidates after a prompt and choose the best; the prompt is computed once. */
  rank<T extends Candidate>(prompt: Prompt, candidates: readonly T[], options?: RankOptions): Promise<Ranking<T>>;
  /** Sample completions, score every token, choose the best. */
  generate(prompt: Prompt, options?: GenerateOptions): Promise<FinishedGeneration>;
  /** Open graphs before they are used, so that the first call need not wait. */
  open(graphs: readonly string[], options?: { signal?: AbortSignal }): Promise<void>;
  /** Release the memory of the graphs and weights; a graph is opened again when it is next used. */
  close(): Promise<void>;
}

/** Open an artifact: an address, or in Node also a folder. Size and SHA-256 of every file that is used are checked. */
export function load(source: string | URL, options?: LoadOptions): Promise<Model>;
