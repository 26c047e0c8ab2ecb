./katran_goclient -A -t 192.0.2.10:443 -f NO_SPORT
./katran_goclient -a -t 192.0.2.10:443 -r 10.1.0.11 -w 10
./katran_goclient -new_hc 10.1.0.11 -somark 1000
