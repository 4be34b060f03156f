// A worklist of Unified Procedure Steps on dcmjs-dimse: one step, with the states and the lock of PS3.4 CC.1.1.
// Usage: node worklist.cjs STEP ; STEP: JSON, a data set by keywords. Writes its port, then what it was asked, line by line.
const path = require('node:path');
const net = require('node:net');
const { createRequire } = require('node:module');
const dimse = createRequire(path.join(process.cwd(), 'x'))('dcmjs-dimse');
const { Dataset, Scp, Server, responses, constants, association, log } = dimse;

log.setLevel('silent');
const step = JSON.parse(process.argv[2]);
let lock = '';
const say = (...words) => console.log(JSON.stringify(words));

class Worklist extends Scp {
  associationRequested(asked) {
    for (const { context } of asked.getPresentationContexts()) {
      const offered = context.getTransferSyntaxUids();
      context.setResult(
        constants.PresentationContextResult.Accept,
        offered.includes(constants.TransferSyntax.ExplicitVRLittleEndian)
          ? constants.TransferSyntax.ExplicitVRLittleEndian
          : constants.TransferSyntax.ImplicitVRLittleEndian
      );
    }
    this.sendAssociationAccept();
  }

  cFindRequest(request, callback) {
    const asked = request.getDataset().getElements();
    const answers = [];
    if (step.ProcedureStepState === asked.ProcedureStepState) {
      const found = responses.CFindResponse.fromRequest(request);
      found.setDataset(new Dataset(step));
      found.setStatus(constants.Status.Pending);
      answers.push(found);
    }
    const last = responses.CFindResponse.fromRequest(request);
    last.setStatus(constants.Status.Success);
    callback([...answers, last]);
  }

  nGetRequest(request, callback) {
    const answer = responses.NGetResponse.fromRequest(request);
    answer.setDataset(new Dataset(step));
    answer.setStatus(constants.Status.Success);
    callback(answer);
  }

  nSetRequest(request, callback) {
    const given = request.getDataset().getElements();
    const answer = responses.NSetResponse.fromRequest(request);
    const ended = ['COMPLETED', 'CANCELED'].includes(step.ProcedureStepState);
    answer.setStatus(ended ? 0xc300 : given.TransactionUID === lock ? 0x0000 : 0xc301);
    if (answer.getStatus() === 0) {
      const { TransactionUID, ...changes } = given;
      Object.assign(step, changes);
    }
    say('set', answer.getStatus(), given);
    callback(answer);
  }

  nActionRequest(request, callback) {
    const { ProcedureStepState: state, TransactionUID: given } = request.getDataset().getElements();
    const answer = responses.NActionResponse.fromRequest(request);
    let status = 0x0000;
    if (state === 'IN PROGRESS') status = step.ProcedureStepState === 'SCHEDULED' ? 0x0000 : 0xc302;
    else if (given !== lock) status = 0xc301;
    if (status === 0x0000) {
      if (state === 'IN PROGRESS') lock = given;
      step.ProcedureStepState = state;
    }
    answer.setStatus(status);
    say('action', request.getActionTypeId(), status, state, given);
    callback(answer);
  }

  associationReleaseRequested() {
    this.sendAssociationReleaseResponse();
  }
}

// A free port: the server has no way to tell which one it was given.
const probe = net.createServer();
probe.listen(0, '127.0.0.1', () => {
  const { port } = probe.address();
  probe.close(() => {
    new Server(Worklist).listen(port);
    say('port', port);
  });
});
