// Live counts by Server-Sent Events, and an honest mark of whether the page is live.
const mark = document.getElementById("live");
const clock = document.getElementById("clock");
let last = 0;

function show(flow) {
  last = Date.now();
  clock.textContent = `${flow.now.utc} · day_obs ${flow.now.day_obs}`;
  clock.title = `${flow.now.tai} TAI, MJD ${flow.now.mjd_tai}`;
  for (const hop of flow.hops) {
    const box = document.querySelector(`[data-hop="${hop.hop}"]`);
    if (!box) continue;
    box.querySelector(".count").textContent = hop.count;
    box.querySelector(".lag").textContent = hop.lag_s === null ? "–" : `${hop.lag_s.toFixed(1)} s`;
    box.classList.toggle("bad", Object.keys(hop.failures).length > 0);
  }
}

const source = new EventSource("/events");
source.addEventListener("flow", (event) => show(JSON.parse(event.data)));

setInterval(() => {
  const age = (Date.now() - last) / 1000;
  const state = age < 4 ? "live" : age < 15 ? "lagging" : "offline";
  mark.className = state;
  mark.textContent = { live: "● live", lagging: "◐ lagging", offline: "■ offline" }[state];
}, 500);
