import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.Header;
import io.debezium.engine.format.Json;
import io.debezium.engine.format.KeyValueHeaderChangeEventFormat;
import java.io.PrintStream;
import java.io.Reader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Properties;
import java.util.StringJoiner;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/**
 * Runs Debezium's engine and writes every record that it hands over as a line of JSON: topic, key,
 * value, and headers as a list of pairs. Key, value and headers' values stand there as the engine
 * made them.
 *
 * <p>Arguments: a file of the engine's properties, the file to write, the number of records after
 * which to stop, the most seconds to wait.
 */
public final class Recorder implements DebeziumEngine.ChangeConsumer<ChangeEvent<String, String>> {
    private final PrintStream out;
    private final long wanted;
    private final CountDownLatch done = new CountDownLatch(1);
    private volatile Throwable failure;
    private long records;

    private Recorder(PrintStream out, long wanted) {
        this.out = out;
        this.wanted = wanted;
    }

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        try (Reader reader = Files.newBufferedReader(Path.of(arguments[0]))) {
            properties.load(reader);
        }
        boolean whole;
        try (PrintStream out = new PrintStream(arguments[1], StandardCharsets.UTF_8)) {
            whole = new Recorder(out, Long.parseLong(arguments[2])).run(properties, Long.parseLong(arguments[3]));
        }
        System.exit(whole ? 0 : 1);
    }

    private boolean run(Properties properties, long seconds) throws Exception {
        ExecutorService executor = Executors.newSingleThreadExecutor();
        DebeziumEngine<ChangeEvent<String, String>> engine =
                DebeziumEngine.create(
                                KeyValueHeaderChangeEventFormat.of(Json.class, Json.class, Json.class))
                        .using(properties)
                        .using(
                                (success, message, error) -> {
                                    if (!success && done.getCount() > 0) {
                                        failure = error != null ? error : new RuntimeException(message);
                                        done.countDown();
                                    }
                                })
                        .notifying(this)
                        .build();
        executor.execute(engine);
        boolean ended = done.await(seconds, TimeUnit.SECONDS);
        if (!ended || failure != null) {
            System.err.println(
                    ended ? "failed: " + failure : records + " of " + wanted + " records after " + seconds + " s");
            return false;
        }
        engine.close();
        executor.shutdown();
        return true;
    }

    @Override
    public void handleBatch(
            List<ChangeEvent<String, String>> batch,
            DebeziumEngine.RecordCommitter<ChangeEvent<String, String>> committer)
            throws InterruptedException {
        for (ChangeEvent<String, String> event : batch) {
            StringJoiner headers = new StringJoiner(",", "[", "]");
            for (Header<String> header : event.<String>headers()) {
                headers.add("[\"" + header.getKey() + "\"," + header.getValue() + "]");
            }
            out.printf(
                    "{\"topic\":\"%s\",\"key\":%s,\"value\":%s,\"headers\":%s}%n",
                    event.destination(), event.key(), event.value(), headers);
            records++;
            committer.markProcessed(event);
        }
        committer.markBatchFinished();
        if (records >= wanted) {
            out.flush();
            done.countDown();
        }
    }
}
