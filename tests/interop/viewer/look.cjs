// Opens a study in OHIF as a reader would, and tells what the page then holds and shows.
// node look.cjs DIST ARCHIVE STUDY CHROMIUM OUT: pictures go to OUT, the last line of standard output is JSON.
'use strict';
const path = require('node:path');
// The packages lie in another folder, in which this is run.
const { chromium } = require(require.resolve('playwright-core', { paths: [process.cwd()] }));
const { serve } = require('./server.cjs');

const FLAGS = [
  '--no-sandbox',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  // WebGL on a machine without a graphics card.
  '--use-angle=swiftshader',
  '--enable-unsafe-swiftshader',
  '--ignore-gpu-blocklist',
];
const WAIT = { timeout: 90000, polling: 100 };

/** What the study browser lists. */
const listed = () =>
  window.services.displaySetService.getActiveDisplaySets().map(one => ({
    modality: one.Modality,
    description: one.SeriesDescription,
    images: one.numImageFrames || (one.instances || [one.instance]).length,
    shown: document.getElementById(`thumbnail-${one.displaySetInstanceUID}`) !== null,
    unsupported: !!one.unsupported,
  }));

/** The image in the viewport. */
const current = () => {
  const [{ viewport }] = window.cornerstone.getEnabledElements();
  const id = viewport.getCurrentImageId();
  return { instance: id.split('/instances/')[1].split('/')[0], index: viewport.getCurrentImageIdIndex() };
};

/** The voxels of the segmentation, by the image that they lie on: positions of those that are set. */
const voxels = () => {
  const service = window.services.segmentationService;
  const [one] = service.getSegmentations();
  const labelmap = one.representationData.Labelmap;
  const found = {};
  for (const id of labelmap.imageIds) {
    const image = window.cornerstone.cache.getImage(id);
    const data = image.voxelManager.getScalarData();
    const set = {};
    data.forEach((value, index) => value && (set[value] ||= []).push(index));
    const instance = image.referencedImageId.split('/instances/')[1].split('/')[0];
    if (Object.keys(set).length) found[instance] = set;
  }
  return { labels: Object.values(one.segments).map(segment => segment.label), slices: found };
};

/** Which image is shown, and its pixels whose place on the screen has a colour: what the viewer draws over a grey CT. */
const coloured = () => {
  const [{ viewport }] = window.cornerstone.getEnabledElements();
  const canvas = viewport.getCanvas();
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const image = viewport.getCornerstoneImage();
  const ratio = window.devicePixelRatio;
  const found = [];
  for (let row = 0; row < image.rows; row++)
    for (let column = 0; column < image.columns; column++) {
      const world = window.cornerstone.utilities.imageToWorldCoords(image.imageId, [column, row]);
      const [x, y] = viewport.worldToCanvas(world).map(value => Math.round(value * ratio));
      if (x < 0 || y < 0 || x >= canvas.width || y >= canvas.height) continue;
      const at = 4 * (y * canvas.width + x);
      const [r, g, b] = pixels.slice(at, at + 3);
      if (Math.max(r, g, b) - Math.min(r, g, b) > 8) found.push(row * image.columns + column);
    }
  return { instance: image.imageId.split('/instances/')[1].split('/')[0], pixels: found };
};

/** The measurements of the report as the viewer read them. */
const measurements = () =>
  window.services.displaySetService
    .getActiveDisplaySets()
    .find(one => one.Modality === 'SR')
    .measurements.map(one => ({
      labels: one.labels,
      loaded: one.loaded,
      instance: one.ReferencedSOPInstanceUID || null,
      graphic: one.coords.length ? one.coords[0].GraphicType : null,
    }));

/** Lines drawn over the image, their points as (column, row) of the image. */
const lines = () => {
  const [{ viewport }] = window.cornerstone.getEnabledElements();
  const image = viewport.getCurrentImageId();
  const drawn = [...viewport.element.querySelectorAll('svg.svg-layer polyline')];
  return drawn.map(one => {
    const numbers = one.getAttribute('points').match(/-?[\d.]+(e-?\d+)?/g).map(Number);
    const points = Array.from({ length: numbers.length / 2 }, (_, i) => numbers.slice(2 * i, 2 * i + 2));
    return points.map(at => window.cornerstone.utilities.worldToImageCoords(image, viewport.canvasToWorld(at)));
  });
};

(async () => {
  const [dist, archive, study, browserPath, out] = process.argv.slice(2);
  const [server, port] = await serve(dist, archive);
  const browser = await chromium.launch({ executablePath: browserPath, headless: true, args: FLAGS });
  const told = { errors: [] };
  try {
    const page = await browser.newPage({ viewport: { width: 1100, height: 760 } });
    page.on('pageerror', error => told.errors.push(String(error)));
    await page.addInitScript(() => {
      // The tour that OHIF gives a first-time visitor.
      localStorage.setItem('shownTours', JSON.stringify(['basicViewerTour']));
    });
    const open = async modality => {
      const id = await page.evaluate(
        wanted =>
          window.services.displaySetService.getActiveDisplaySets().find(one => one.Modality === wanted)
            .displaySetInstanceUID,
        modality
      );
      await page.locator(`[id="thumbnail-${id}"]`).dblclick();
    };
    const settled = () =>
      page.waitForFunction(
        () => window.cornerstone.getEnabledElements().every(({ viewport }) => viewport.viewportStatus === 'rendered'),
        null,
        WAIT
      );
    // A segmentation comes to the screen, and the viewport to its slice, a while after the page holds it.
    const drawn = async () => {
      let seen = await page.evaluate(coloured);
      for (const end = Date.now() + WAIT.timeout; Date.now() < end; ) {
        await page.waitForTimeout(300);
        const before = JSON.stringify(seen);
        seen = await page.evaluate(coloured);
        if (seen.pixels.length && JSON.stringify(seen) === before) break;
      }
      return seen;
    };
    const picture = name => page.screenshot({ path: path.join(out, `${name}.png`) });

    await page.goto(`http://127.0.0.1:${port}/viewer?StudyInstanceUIDs=${study}`);
    await page.waitForFunction(() => window.cornerstone?.getEnabledElements().length === 1, null, WAIT);
    await page.waitForFunction(() => document.querySelectorAll('[id^="thumbnail-"]').length >= 2, null, WAIT);
    await settled();
    told.series = await page.evaluate(listed);

    await open('SR');
    await page.waitForFunction(() => document.querySelectorAll('svg.svg-layer polyline').length > 0, null, WAIT);
    await settled();
    told.report = {
      measurements: await page.evaluate(measurements),
      at: await page.evaluate(current),
      lines: await page.evaluate(lines),
    };
    await picture('report');

    await open('SEG');
    await page.getByText('Yes', { exact: true }).click(WAIT);
    await page.waitForFunction(() => window.services.segmentationService.getSegmentations().length > 0, null, WAIT);
    await settled();
    told.segmentation = { coloured: await drawn(), ...(await page.evaluate(voxels)) };
    await picture('segmentation');

    await open('OT');
    await page.waitForFunction(
      () => window.cornerstone.getEnabledElements()[0]?.viewport.getCornerstoneImage?.()?.color,
      null,
      WAIT
    );
    await settled();
    told.capture = await page.evaluate(current);
    await picture('capture');
  } finally {
    await browser.close();
    server.close();
  }
  console.log(JSON.stringify(told));
})().catch(error => {
  console.error(error);
  process.exit(1);
});
