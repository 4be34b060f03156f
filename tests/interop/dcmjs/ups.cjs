// Asks a worklist of Unified Procedure Steps with dcmjs-dimse; writes what was answered as one line of JSON.
// Usage: node ups.cjs PORT CALLING CALLED REQUESTS
// REQUESTS: JSON, a list of [operation ("create", "get", "set", "action" or "find"), instance, data set by keywords, action]
const path = require('node:path');
const { createRequire } = require('node:module');
const { Client, Dataset, requests, log } = createRequire(path.join(process.cwd(), 'x'))('dcmjs-dimse');

const PUSH = '1.2.840.10008.5.1.4.34.6.1';
const PULL = '1.2.840.10008.5.1.4.34.6.3';

function made([operation, instance, elements, action]) {
  switch (operation) {
    case 'create': return new requests.NCreateRequest(PUSH, instance);
    case 'get': return new requests.NGetRequest(PUSH, instance, []);
    case 'set': return new requests.NSetRequest(PUSH, instance);
    case 'action': return new requests.NActionRequest(PUSH, instance, action);
    default: {
      const request = new requests.CFindRequest();
      request.setAffectedSopClassUid(PULL);
      return request;
    }
  }
}

async function main() {
  const [port, calling, called, asked] = process.argv.slice(2);
  log.setLevel('silent');
  const client = new Client();
  const answers = [];
  for (const one of JSON.parse(asked)) {
    const request = made(one);
    if (one[0] !== 'get') request.setDataset(new Dataset(one[2]));
    request.on('response', (response) => {
      const found = response.hasDataset() ? response.getDataset().getElements() : null;
      answers.push([one[0], response.getStatus(), found]);
    });
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
