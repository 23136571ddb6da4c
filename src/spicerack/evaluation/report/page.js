'use strict';
const root = document.documentElement;
const button = document.getElementById('language');
function speak(language) {
  root.dataset.lang = language;
  root.lang = language === 'zh' ? 'zh-CN' : 'en';
  button.textContent = language === 'zh' ? 'English' : '中文';
  button.lang = language === 'zh' ? 'en' : 'zh-CN';
}
const asked = location.hash === '#zh' ? 'zh' : location.hash === '#en' ? 'en' : (navigator.language || 'en').slice(0, 2);
speak(asked === 'zh' ? 'zh' : 'en');
button.hidden = false;
button.addEventListener('click', () => speak(root.dataset.lang === 'zh' ? 'en' : 'zh'));
const slider = document.getElementById('bits');
if (slider) {
  const move = () => {
    for (const path of document.querySelectorAll('.levels')) path.classList.toggle('on', path.dataset.bits === slider.value);
    for (const line of document.querySelectorAll('#bits-said > [data-bits]')) line.hidden = line.dataset.bits !== slider.value;
    slider.setAttribute('aria-valuetext', slider.value + ' bits / 位');
  };
  slider.closest('.slider').hidden = false;
  slider.addEventListener('input', move);
  move();
}
const save = document.getElementById('save');
save.hidden = false;
save.addEventListener('click', () => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([document.getElementById('facts').textContent], {type: 'application/json'}));
  link.download = 'report.json';
  link.click();
});
