// Live counts by Server-Sent Events, and an honest mark of whether the page is live.
const mark = document.getElementById("live");
const clock = document.getElementById("clock");
const alarmCount = document.getElementById("alarm-count");
const alarmRows = document.getElementById("alarms");
let last = 0;

function put(box, name, text) {
  const place = box.querySelector(`.${name}`);
  if (place) place.textContent = text;
}

function showAlarms(alarms) {
  alarmCount.textContent = alarms.length ? `▲ ${alarms.length} alarms` : "alarms";
  alarmCount.classList.toggle("warn", alarms.length > 0);
  if (!alarmRows) return;
  alarmRows.replaceChildren(...alarms.map((alarm) => {
    const row = document.createElement("tr");
    row.className = `severity-${alarm.severity}`;
    for (const text of ["▲".repeat(alarm.severity), alarm.since, alarm.component, alarm.text]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
  if (!alarms.length) {
    const cell = alarmRows.insertRow().insertCell();
    cell.colSpan = 4;
    cell.textContent = "No alarms.";
  }
}

function show(flow) {
  last = Date.now();
  clock.textContent = `${flow.now.utc} · day_obs ${flow.now.day_obs}`;
  clock.title = `${flow.now.tai} TAI, MJD ${flow.now.mjd_tai}`;
  for (const hop of flow.hops) {
    const box = document.querySelector(`[data-hop="${hop.hop}"]`);
    if (!box) continue;
    put(box, "count", hop.count);
    put(box, "backlog", hop.backlog === null ? "–" : hop.backlog);
    put(box, "lag", hop.lag_s === null ? "–" : `${hop.lag_s.toFixed(1)} s`);
    put(box, "last", hop.last_utc ?? "–");
    put(box, "failures", Object.entries(hop.failures).map(([outcome, count]) => `${outcome} ${count}`).join(" "));
    box.classList.toggle("bad", Object.keys(hop.failures).length > 0);
  }
  showAlarms(flow.alarms);
}

const source = new EventSource("/events");
source.addEventListener("flow", (event) => show(JSON.parse(event.data)));

setInterval(() => {
  const age = (Date.now() - last) / 1000;
  const state = age < 4 ? "live" : age < 15 ? "lagging" : "offline";
  mark.className = state;
  mark.textContent = { live: "● live", lagging: "◐ lagging", offline: "■ offline" }[state];
}, 500);
