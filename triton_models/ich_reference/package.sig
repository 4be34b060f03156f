{
  "algorithm": "Ed25519",
  "key": "49807d3b1e5d2611",
  "signature": "lOKyWEwxvpSxhKoqIJIumHTzI6DjMePraTnq3vD5myNaX/nHylL/rkK//dQDbS4277i9nP4yZx2ZDz+YibYTBg=="
}
