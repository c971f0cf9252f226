// How search results are ordered: what explains comes first, how it is built and the changelog last.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => score + (/^(tutorials|howto|how_it_works|limits)/.test(docname) ? 4 : /^(\d\d_|rules\/|changelog|contributing)/.test(docname) ? -4 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0, // those of Sphinx
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
