// Tells with dcmjs-dimse what was performed, and writes what was answered to each request as one line of JSON.
// Usage: node steps.cjs PORT CALLING CALLED REQUESTS
// REQUESTS: JSON, a list of [operation ("create" or "set"), SOP class, SOP instance, data set by keywords]
const path = require('node:path');
const { createRequire } = require('node:module');
const { Client, Dataset, requests, log } = createRequire(path.join(process.cwd(), 'x'))('dcmjs-dimse');

async function main() {
  const [port, calling, called, asked] = process.argv.slice(2);
  log.setLevel('silent');
  const client = new Client();
  const answers = [];
  for (const [operation, sopClass, sopInstance, elements] of JSON.parse(asked)) {
    const Request = operation === 'create' ? requests.NCreateRequest : requests.NSetRequest;
    const request = new Request(sopClass, sopInstance);
    request.setDataset(new Dataset(elements));
    request.on('response', (response) => answers.push([response.getStatus(), response.getErrorComment() ?? '']));
    client.addRequest(request);
  }
  const outcome = await new Promise((resolve) => {
    client.on('networkError', (error) => resolve(`error: ${error.message}`));
    client.on('associationRejected', () => resolve('rejected'));
    client.on('associationReleased', () => resolve('released'));
    client.send('127.0.0.1', Number(port), calling, called);
  });
  console.log(JSON.stringify({ outcome, answers }));
}

main();
