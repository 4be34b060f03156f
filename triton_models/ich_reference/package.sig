{
  "algorithm": "Ed25519",
  "key": "e8949ff377b39979",
  "signature": "l7GvpQLy2dCq0SNRIaMj4iD9Rlbupj/BpDPm8Vd+isAhIlCngD9jjCSNqKNl8/enIDmIMTSlFE5zZr5MW4mvAg=="
}
