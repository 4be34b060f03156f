// Serves the built OHIF viewer beside a proxy to an archive's DICOMweb, on one origin as its makers advise.
'use strict';
const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');

const TYPES = {
  '.html': 'text/html',
  '.js': 'text/javascript',
  '.css': 'text/css',
  '.json': 'application/json',
  '.svg': 'image/svg+xml',
  '.wasm': 'application/wasm',
};

const CONFIG = {
  routerBasename: null,
  extensions: [],
  modes: [],
  customizationService: {},
  showStudyList: true,
  showWarningMessageForCrossOrigin: false,
  investigationalUseDialog: { option: 'never' },
  maxNumberOfWebWorkers: 2,
  defaultDataSourceName: 'archive',
  dataSources: [
    {
      namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
      sourceName: 'archive',
      configuration: {
        friendlyName: 'archive',
        name: 'archive',
        qidoRoot: '/dicom-web',
        wadoRoot: '/dicom-web',
        wadoUriRoot: '/dicom-web',
        imageRendering: 'wadors',
        thumbnailRendering: 'wadors',
        supportsWildcard: false,
        omitQuotationForMultipartRequest: true,
        bulkDataURI: { enabled: true, relativeResolution: 'studies' },
      },
    },
  ],
};

/** Starts the server; resolves to its port. `archive` is the archive's HTTP address, without a trailing slash. */
function serve(dist, archive) {
  const target = new URL(archive);
  const server = http.createServer((request, response) => {
    if (request.url.startsWith('/dicom-web/')) {
      const forward = http.request(
        { host: target.hostname, port: target.port, path: request.url, method: request.method, headers: request.headers },
        answer => {
          response.writeHead(answer.statusCode, answer.headers);
          answer.pipe(response);
        }
      );
      forward.on('error', () => response.writeHead(502).end());
      request.pipe(forward);
      return;
    }
    const name = decodeURIComponent(new URL(request.url, 'http://host').pathname);
    const headers = { 'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp' };
    if (name === '/app-config.js') {
      response.writeHead(200, { ...headers, 'Content-Type': 'text/javascript' });
      response.end(`window.config = ${JSON.stringify(CONFIG)};`);
      return;
    }
    let file = path.join(dist, path.normalize(name));
    if (!fs.existsSync(file) || !fs.statSync(file).isFile()) file = path.join(dist, 'index.html');
    response.writeHead(200, { ...headers, 'Content-Type': TYPES[path.extname(file)] || 'application/octet-stream' });
    fs.createReadStream(file).pipe(response);
  });
  return new Promise(resolve => server.listen(0, '127.0.0.1', () => resolve([server, server.address().port])));
}

module.exports = { serve };
