// [[model's path, resource], ...] on stdin -> one line on stdout for each that its model refuses.
import { readFileSync } from "node:fs";

for (const [path, resource] of JSON.parse(readFileSync(0))) {
  const Model = (await import(path))[resource.kind];
  try {
    new Model(resource).validate();
  } catch (error) {
    console.log(`${resource.kind} ${resource.metadata.name}: ${error.message}`);
  }
}
