// node:crypto for the adapter: the first id that it makes when a process is parked is the one that process has.
import { randomUUID as random } from "node:crypto";
import { offeredId } from "./sdk.mjs";

export const randomUUID = () => offeredId() ?? random();
